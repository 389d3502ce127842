"""The rope op at the sizes of real models, and what only a GPU shows. Small sizes: kernels/test_rope.py."""

import pytest
import torch
from bar import assert_meets_bar
from torch import Tensor
from workloads import POPULARITY, popularity, random_bank, random_mixes

from ia3rt import ops, reference

CAPACITY, SLOTS = 40, 33
SHAPES = {  # heads, heads of k and v, D, rotary_dim, whether q, k and v lie head by head, interleaved
    "Llama-3-8B": (32, 8, 128, 128, False, False),
    "SmolLM2-135M": (9, 3, 64, 64, False, False),
    "Phi-3-mini": (32, 32, 96, 96, False, False),
    "GPT-NeoX-20B": (64, 64, 96, 24, True, False),
    "Phi-2": (32, 32, 80, 32, False, False),
    "GLM-4-9B": (32, 2, 128, 64, False, True),
}


class Attention:
    """An attention's projection, with a site for all of it, and the angles of a sequence."""

    def __init__(self, name: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.heads, self.heads_kv, self.D, self.rotary, self.by_head, self.interleaved = SHAPES[name]
        self.generator = torch.Generator().manual_seed(self.D)
        self.dtype, self.width = dtype, (self.heads + 2 * self.heads_kv) * self.D
        self.l = random_bank(CAPACITY, self.width, self.generator, before=16).cuda()
        self.mixes = random_mixes(SLOTS, CAPACITY, 4, self.generator).cuda()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to("cuda", self.dtype)

    def route(self, name: str, rows: int) -> Tensor:
        return popularity(name, rows, SLOTS, self.generator).cuda()

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(length)[:, None] * 1e-4 ** torch.linspace(0, 1, self.rotary // 2)
        repeated = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat((angles, angles), -1)
        return repeated.cos().to("cuda", self.dtype), repeated.sin().to("cuda", self.dtype)

    def parts(self, fused: Tensor) -> tuple[Tensor, ...]:
        if self.by_head:
            return fused.unflatten(-1, (self.heads, 3, self.D)).unbind(-2)
        return fused.unflatten(-1, (-1, self.D)).split((self.heads, self.heads_kv, self.heads_kv), -2)

    def __call__(self, fused: Tensor, angles: tuple[Tensor, Tensor], route: Tensor) -> list[Tensor]:
        return ops.rope(*self.parts(fused), *self.parts(self.l), *angles, self.mixes, route, self.interleaved)

    def check(self, rows: int, length: int, route: Tensor) -> None:
        """Compare the op and its gradients with the reference and its autograd."""
        fused, angles = self.randn(rows, self.width), self.angles(length)

        def run(op, dtype: torch.dtype) -> list[Tensor]:
            x = fused.to(dtype).requires_grad_()
            l = self.l.to(torch.promote_types(dtype, torch.float32)).requires_grad_()  # noqa: E741
            tables = (table.to(dtype) for table in angles)
            ys = op(*self.parts(x), *self.parts(l), *tables, self.mixes, route, self.interleaved)
            dys = [torch.linspace(-1, 2, y.numel(), device="cuda").to(self.dtype).to(dtype).view(y.shape) for y in ys]
            return [*(y.detach() for y in ys), *torch.autograd.grad(ys, (x, l), dys)]

        results = (run(ops.rope, self.dtype), run(reference.rope, self.dtype))
        for ours, theirs, truth in zip(*results, run(reference.rope, torch.float64), strict=True):
            assert_meets_bar(ours, theirs, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("rows", "length", "R"), [(1, 1, 1), (16, 1, 16), (64, 16, 4), (2048, 512, 1), (1024, 512, 2)])
def test_sizes_of_models(rows, length, R, name, dtype) -> None:
    attention = Attention(name, dtype)
    attention.check(rows, length, attention.route("uniform", R))


@pytest.mark.parametrize("name", POPULARITY)
def test_popularity(name) -> None:
    attention = Attention("Llama-3-8B")
    attention.check(256, 256, attention.route(name, 256))


def test_a_paged_cache_of_more_than_two_to_the_31_elements() -> None:
    attention, rows, size = Attention("Llama-3-8B"), 32, 16
    blocks = (1 << 31) // (size * attention.heads_kv * attention.D) + 2
    if torch.cuda.mem_get_info()[0] < 5 * 2 * blocks * size * attention.heads_kv * attention.D:
        pytest.skip("needs 20 GiB")
    cache = torch.zeros(2, blocks, size, attention.heads_kv, attention.D, dtype=attention.dtype, device="cuda")
    slots = (blocks * size - 1 - torch.arange(rows, device="cuda")).where(torch.arange(rows, device="cuda") > 0, -1)
    fused, angles, route = (
        attention.randn(rows, attention.width),
        attention.angles(rows),
        attention.route("distinct", 4),
    )
    arguments = *attention.parts(fused), *attention.parts(attention.l), *angles, attention.mixes, route, False
    q = ops.rope_into_cache(*arguments, *cache, slots)
    for ours, theirs in zip((q, *cache.flatten(1, 2)[:, slots[1:]]), ops.rope(*arguments), strict=True):
        assert torch.equal(ours, theirs if len(ours) == rows else theirs[1:])
    assert not cache[:, :1].any()


def test_a_cuda_graph_replays_with_other_mixes() -> None:
    attention = Attention("Phi-3-mini")
    fused, angles, route = attention.randn(16, attention.width), attention.angles(1), attention.route("distinct", 16)
    attention(fused, angles, route)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = attention(fused, angles, route)
    for name in POPULARITY:
        route.copy_(attention.route(name, 16))
        attention.mixes[5, 2] = 7
        graph.replay()
        assert all(map(torch.equal, ys, attention(fused, angles, route)))


def test_nothing_waits_for_the_device() -> None:
    attention = Attention("SmolLM2-135M")
    fused, angles, route = attention.randn(4, 16, attention.width), attention.angles(16), attention.route("distinct", 4)
    fused.requires_grad_()
    cache, slots = torch.zeros(2, 8, 8, 3, 64, dtype=torch.bfloat16, device="cuda"), torch.arange(64, device="cuda")

    def run() -> None:
        sum(y.sum() for y in attention(fused, angles, route)).backward()
        parts = (*attention.parts(fused.detach()), *attention.parts(attention.l))
        ops.rope_into_cache(*parts, *angles, attention.mixes, route, False, *cache, slots)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
