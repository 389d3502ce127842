"""The activation op at the sizes of real models, and what only a GPU shows. Small sizes: kernels/test_activation.py."""

import pytest
import torch
from bar import assert_meets_bar
from torch import Tensor
from workloads import POPULARITY, popularity, random_bank, random_mixes

from ia3rt import ops, reference

CAPACITY, SLOTS = 40, 33


class MLP:
    """What stands between an MLP's matrices: gate and up, which are halves of one tensor, and a site."""

    def __init__(self, N: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(N)
        self.dtype, self.N = dtype, N
        self.l = random_bank(CAPACITY, N, self.generator, before=16).cuda()
        self.mixes = random_mixes(SLOTS, CAPACITY, 4, self.generator).cuda()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to("cuda", self.dtype)

    def route(self, name: str, rows: int) -> Tensor:
        return popularity(name, rows, SLOTS, self.generator).cuda()

    def __call__(self, fused: Tensor, route: Tensor, kind: str = "silu") -> Tensor:
        return ops.activation(*fused.chunk(2, -1), self.l, self.mixes, route, kind)

    def check(self, rows: int, route: Tensor, kind: str = "silu") -> None:
        """Compare the op and its gradients with the reference and its autograd."""
        fused, dy = self.randn(rows, 2 * self.N), self.randn(rows, self.N)

        def run(op, dtype: torch.dtype) -> list[Tensor]:
            x = fused.to(dtype).requires_grad_()
            l = self.l.to(torch.promote_types(dtype, torch.float32)).requires_grad_()  # noqa: E741
            y = op(*x.chunk(2, -1), l, self.mixes, route, kind)
            return [y.detach(), *torch.autograd.grad(y, (x, l), dy.to(dtype))]

        results = (run(ops.activation, self.dtype), run(reference.activation, self.dtype))
        for ours, theirs, truth in zip(*results, run(reference.activation, torch.float64), strict=True):
            assert_meets_bar(ours, theirs, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("N", [1536, 14336, 1001])
@pytest.mark.parametrize(("rows", "routed"), [(1, 1), (16, 16), (32, 1), (1024, 8), (1024, 1), (1024, 1024)])
def test_sizes_of_models(rows, routed, N, dtype) -> None:
    mlp = MLP(N, dtype)
    mlp.check(rows, mlp.route("uniform", routed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_kinds(kind, dtype) -> None:
    """The device's exp, erf and division, which are not the interpreter's."""
    mlp = MLP(4096, dtype)
    mlp.check(64, mlp.route("distinct", 64), kind)


@pytest.mark.parametrize("name", POPULARITY)
def test_popularity(name) -> None:
    mlp = MLP(4096, torch.bfloat16)
    mlp.check(512, mlp.route(name, 512))


def test_a_cuda_graph_replays_with_other_mixes() -> None:
    mlp = MLP(2048, torch.bfloat16)
    fused, route = mlp.randn(16, 4096), mlp.route("distinct", 16)
    mlp(fused, route)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mlp(fused, route)
    for name in POPULARITY:
        route.copy_(mlp.route(name, 16))
        mlp.mixes[5, 2] = 7
        graph.replay()
        assert torch.equal(y, mlp(fused, route))


def test_rows_beyond_two_to_the_31_elements() -> None:
    width, rows = 1 << 15, (1 << 15) + 1
    if torch.cuda.mem_get_info()[0] < 4 * 2 * rows * width:
        pytest.skip("needs 8 GiB")
    fused = torch.ones(rows, 2 * width, dtype=torch.float16, device="cuda")
    mlp = MLP(width, torch.float16)
    route = torch.ones(1, dtype=torch.int32, device="cuda")
    assert torch.equal(mlp(fused, route)[-1:], mlp(fused[:1], route))


def test_nothing_waits_for_the_device() -> None:
    mlp = MLP(2048, torch.bfloat16)
    fused, route = mlp.randn(4, 16, 4096).requires_grad_(), mlp.route("distinct", 4)
    mlp(fused, route).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mlp(fused, route).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
