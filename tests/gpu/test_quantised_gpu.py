"""Quantised layers at the sizes of real models, and what only a GPU shows. Small: kernels/test_linear_quantised.py."""

import pytest
import torch
from bar import assert_meets_bar, sums_of
from torch import Tensor
from workloads import POPULARITY, popularity, random_bank, random_mixes

from ia3rt import ops, reference

CAPACITY, SLOTS = 40, 33
KINDS = ("int8", "fp8", "int4", "gptq", "gptq_v2")


class Layer:
    """Any bits are a weight: what they stand for, the reference says, which the small tests hold to the formats."""

    def __init__(self, kind: str, N: int, K: int, dtype: torch.dtype, g: int = 128, act_order: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(N)
        self.kind, self.dtype, self.g = kind, dtype, 0 if kind in ("int8", "fp8") else g
        count, zeros, groups = -(-K // g), None, None
        scales = (0.5 + torch.rand(count, N, generator=self.generator)) / (8 * K**0.5)
        if kind == "int8":
            weight, scales = self.integers(torch.int8, N, K), scales[0] / 16
        elif kind == "fp8":
            weight = (60 * torch.randn(N, K, generator=self.generator)).to(torch.float8_e4m3fn)
            scales = scales[0] / 16
        elif kind == "int4":
            weight = self.integers(torch.int8, N, K // 2)
            zeros = (torch.randn(count, N, generator=self.generator) / K**0.5).half()
        else:
            weight, zeros = self.integers(torch.int32, K // 8, N), self.integers(torch.int32, count, N // 8)
        if act_order:
            groups = (torch.arange(K) // g)[torch.randperm(K, generator=self.generator)].to(torch.int32)
        stored = (weight, scales if self.g == 0 else scales.half(), zeros, groups)
        self.stored = tuple(None if part is None else part.cuda().contiguous() for part in stored)
        self.bias = self.randn(N)
        self.l_in, self.l_out = (random_bank(CAPACITY, width, self.generator, before=16).cuda() for width in (K, N))
        self.mixes = random_mixes(SLOTS, CAPACITY, 4, self.generator).cuda()

    def integers(self, dtype: torch.dtype, *shape: int) -> Tensor:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max + 1, shape, generator=self.generator).to(dtype)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to("cuda", self.dtype)

    def route(self, name: str, rows: int) -> Tensor:
        return popularity(name, rows, SLOTS, self.generator).cuda()

    def __call__(self, x: Tensor, route: Tensor) -> Tensor:
        rest = (self.bias, self.l_in, self.l_out, self.mixes, route, self.kind, self.g)
        return ops.linear_quantised(x, *self.stored, *rest)

    def check(self, x: Tensor, route: Tensor) -> None:
        """Compare with the reference."""

        def run(dtype: torch.dtype) -> Tensor:
            bias, *banks = (
                part.to(dtype) if dtype == torch.float64 else part for part in (self.bias, self.l_in, self.l_out)
            )
            rest = (bias, *banks, self.mixes, route, self.kind, self.g)
            return reference.linear_quantised(x.to(dtype), *self.stored, *rest)

        dense = reference.dequantise(*self.stored, self.kind, self.g, torch.float64)
        sums = sums_of(x, dense, self.bias, self.l_in, self.l_out, self.mixes, route)
        assert_meets_bar(self(x, route), run(self.dtype), run(torch.float64), sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("N", "K"), [(1024, 4096), (4096, 14336), (576, 1536)])
@pytest.mark.parametrize(("rows", "routed"), [(1, 1), (16, 16), (64, 64), (2048, 1), (2048, 2048)])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_models(kind, rows, routed, N, K, dtype) -> None:
    layer = Layer(kind, N, K, dtype)
    layer.check(layer.randn(rows, K), layer.route("uniform", routed))


@pytest.mark.parametrize("g", [32, 64, 128])
@pytest.mark.parametrize("rows", [4, 512])
@pytest.mark.parametrize("act_order", [False, True])
def test_groups(act_order, rows, g) -> None:
    layer = Layer("gptq", 1024, 4096, torch.float16, g, act_order)
    layer.check(layer.randn(rows, 4096), layer.route("zipf", rows))


def test_sizes_that_align_with_nothing() -> None:
    layer = Layer("int8", 1001, 1003, torch.bfloat16)
    for rows in (3, 70, 1000):
        layer.check(layer.randn(rows, 1003), layer.route("zipf", rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [16, 512])
def test_a_cuda_graph_replays_with_other_mixes(rows, kind) -> None:
    layer = Layer(kind, 1024, 2048, torch.bfloat16)
    x, route = layer.randn(rows, 2048), layer.route("distinct", rows)
    layer(x, route)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, route)
    for name in POPULARITY:
        route.copy_(layer.route(name, rows))
        layer.mixes[5, 2] = 7
        graph.replay()
        assert torch.equal(y, layer(x, route))


@pytest.mark.parametrize("kind", KINDS)
def test_results_repeat_to_the_bit(kind) -> None:
    layer = Layer(kind, 1024, 4096, torch.bfloat16)
    x, route = layer.randn(16, 4096), layer.route("zipf", 16)
    first = layer(x, route)
    assert all(torch.equal(layer(x, route), first) for _ in range(20))


def test_nothing_waits_for_the_device() -> None:
    layer = Layer("int4", 1024, 2048, torch.bfloat16)
    x, route = layer.randn(4, 16, 2048), layer.route("distinct", 4)
    layer(x, route)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, route)
    finally:
        torch.cuda.set_sync_debug_mode("default")
