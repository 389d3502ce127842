"""The first half of an MLP at the sizes of real models, and what only a GPU shows. Small: kernels/test_gate_up.py."""

import pytest
import torch
from bar import assert_meets_bar
from torch import Tensor
from workloads import POPULARITY, popularity, random_bank, random_mixes

from ia3rt import ops, reference

CAPACITY, SLOTS = 40, 33


class MLP:
    """Gate and up, which are halves of one weight, their biases, and the site behind them."""

    def __init__(self, N: int, K: int, dtype: torch.dtype, gated: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(N)
        self.dtype, self.K = dtype, K
        gate, up = (self.randn(2 * N, K) / K**0.5).chunk(2)
        self.layers = (gate, self.randn(N), up, self.randn(N)) if gated else (gate, self.randn(N), None, None)
        self.l = random_bank(CAPACITY, N, self.generator, before=16).cuda()
        self.mixes = random_mixes(SLOTS, CAPACITY, 4, self.generator).cuda()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to("cuda", self.dtype)

    def route(self, name: str, rows: int) -> Tensor:
        return popularity(name, rows, SLOTS, self.generator).cuda()

    def __call__(self, x: Tensor, route: Tensor, kind: str = "silu") -> Tensor:
        return ops.gate_up(x, *self.layers, self.l, self.mixes, route, kind)

    def check(self, rows: int, route: Tensor, kind: str = "silu") -> None:
        """Compare the op and its gradients for x and l with the reference and its autograd."""
        x, dy = self.randn(rows, self.K), self.randn(rows, self.l.shape[1])

        def run(op, dtype: torch.dtype) -> list[Tensor]:
            inputs = x.to(dtype).requires_grad_()
            layers = (None if tensor is None else tensor.to(dtype) for tensor in self.layers)
            l = self.l.to(torch.promote_types(dtype, torch.float32)).requires_grad_()  # noqa: E741
            y = op(inputs, *layers, l, self.mixes, route, kind)
            return [y.detach(), *torch.autograd.grad(y, (inputs, l), dy.to(dtype))]

        results = (run(ops.gate_up, self.dtype), run(reference.gate_up, self.dtype))
        for ours, theirs, truth in zip(*results, run(reference.gate_up, torch.float64), strict=True):
            assert_meets_bar(ours, theirs, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("N", "K"), [(1536, 576), (14336, 4096), (1001, 1003)])
@pytest.mark.parametrize(("rows", "routed"), [(1, 1), (16, 16), (32, 1), (64, 64), (1024, 8), (1024, 1), (1024, 1024)])
def test_sizes_of_models(rows, routed, N, K, dtype) -> None:
    mlp = MLP(N, K, dtype)
    mlp.check(rows, mlp.route("uniform", routed))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_kinds(kind, rows, gated) -> None:
    mlp = MLP(3072, 768, torch.bfloat16, gated)
    mlp.check(rows, mlp.route("distinct", rows), kind)


@pytest.mark.parametrize("name", POPULARITY)
def test_popularity(name) -> None:
    mlp = MLP(1536, 576, torch.bfloat16)
    mlp.check(512, mlp.route(name, 512))


@pytest.mark.parametrize("rows", [16, 4096])
def test_a_cuda_graph_replays_with_other_mixes(rows) -> None:
    mlp = MLP(1536, 576, torch.bfloat16)
    x, route = mlp.randn(rows, 576), mlp.route("distinct", rows)
    mlp(x, route)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mlp(x, route)
    for name in POPULARITY:
        route.copy_(mlp.route(name, rows))
        mlp.mixes[5, 2] = 7
        graph.replay()
        assert torch.equal(y, mlp(x, route))


@pytest.mark.parametrize("rows", [1, 16, 64, 4096])
def test_results_repeat_to_the_bit(rows) -> None:
    mlp = MLP(8192, 3072, torch.bfloat16)
    x, route = mlp.randn(rows, 3072), mlp.route("zipf", rows)
    first = mlp(x, route)
    assert all(torch.equal(mlp(x, route), first) for _ in range(20))


def test_rows_beyond_two_to_the_31_elements() -> None:
    width, rows = 1 << 16, (1 << 15) + 1
    if torch.cuda.mem_get_info()[0] < 2 * 2 * rows * width:
        pytest.skip("needs 8 GiB")
    mlp = MLP(width, 64, torch.float16)
    x, route = torch.ones(rows, 64, dtype=torch.float16, device="cuda"), mlp.route("distinct", 1)
    y = mlp(x, route)
    assert torch.equal(y[-1], y[0])


def test_nothing_waits_for_the_device() -> None:
    mlp = MLP(1536, 576, torch.bfloat16)
    x, route = mlp.randn(4, 16, 576).requires_grad_(), mlp.route("distinct", 4)
    mlp(x, route).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mlp(x, route).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
