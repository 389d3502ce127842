"""The linear and scale ops at the sizes of real models, and what only a GPU shows. Small: kernels/test_linear.py."""

import pytest
import torch
from bar import assert_meets_bar, sums_of
from torch import Tensor
from workloads import POPULARITY, popularity, random_bank, random_mixes

from ia3rt import ops, reference

CAPACITY, SLOTS = 40, 33


class Layer:
    def __init__(self, N: int, K: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(N)
        self.dtype = dtype
        self.weight, self.bias = self.randn(N, K) / K**0.5, self.randn(N)
        self.l_in, self.l_out = (random_bank(CAPACITY, width, self.generator, before=16).cuda() for width in (K, N))
        self.mixes = random_mixes(SLOTS, CAPACITY, 4, self.generator).cuda()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to("cuda", self.dtype)

    def route(self, name: str, rows: int) -> Tensor:
        return popularity(name, rows, SLOTS, self.generator).cuda()

    def __call__(self, x: Tensor, route: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.l_in, self.l_out, self.mixes, route)

    def check(self, x: Tensor, route: Tensor) -> None:
        """Compare with the reference. An accumulation as long as these orders its sums as it likes."""
        layer = (self.weight, self.bias, self.l_in, self.l_out)
        truth = reference.linear(x.double(), *(tensor.double() for tensor in layer), self.mixes, route)
        sums = sums_of(x, *layer, self.mixes, route)
        assert_meets_bar(self(x, route), reference.linear(x, *layer, self.mixes, route), truth, sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("N", "K"), [(1024, 4096), (4096, 14336), (2304, 768), (1001, 1003)])
@pytest.mark.parametrize(("rows", "routed"), [(1, 1), (16, 16), (32, 1), (64, 64), (2048, 8), (2048, 1), (2048, 2048)])
def test_sizes_of_models(rows, routed, N, K, dtype) -> None:
    layer = Layer(N, K, dtype)
    layer.check(layer.randn(rows, K), layer.route("uniform", routed))


@pytest.mark.parametrize("name", POPULARITY)
@pytest.mark.parametrize("rows", [32, 512])
def test_popularity(rows, name) -> None:
    layer = Layer(1024, 4096, torch.bfloat16)
    layer.check(layer.randn(rows, 4096), layer.route(name, rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("N", "K"), [(1024, 4096), (4096, 4096), (1001, 1003)])
@pytest.mark.parametrize(("rows", "routed"), [(1, 1), (16, 16), (64, 64), (512, 4), (4096, 1), (2048, 2048)])
def test_pairs_of_layers(rows, routed, N, K, dtype) -> None:
    a, b = Layer(N, K, dtype), Layer(N, K, dtype)
    b.weight, b.l_out = -2 * b.weight.flip(0), random_bank(CAPACITY, N, b.generator, before=16).cuda()
    x, routing = a.randn(rows, K), (a.mixes, a.route("uniform", routed))
    layers = [(layer.weight, layer.bias, layer.l_out) for layer in (a, b)]
    for y, (weight, bias, l_out) in zip(ops.linear_pair(x, *layers[0], *layers[1], *routing), layers, strict=True):
        truth = reference.linear(x.double(), weight.double(), bias.double(), None, l_out.double(), *routing)
        sums = sums_of(x, weight, bias, None, l_out, *routing)
        assert_meets_bar(y, reference.linear(x, weight, bias, None, l_out, *routing), truth, sums)


@pytest.mark.parametrize("rows", [16, 4096])
def test_a_cuda_graph_replays_with_other_mixes(rows) -> None:
    """With a workspace for the sums, and with tensor descriptors."""
    layer = Layer(1024, 2048, torch.bfloat16)
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


@pytest.mark.parametrize("rows", [1, 16, 64, 4096])
def test_results_repeat_to_the_bit(rows) -> None:
    layer = Layer(1024, 4096, torch.bfloat16)
    x, route = layer.randn(rows, 4096), layer.route("zipf", rows)
    first = layer(x, route)
    assert all(torch.equal(layer(x, route), first) for _ in range(20))


def test_rows_beyond_two_to_the_31_elements() -> None:
    width, rows = 1 << 16, (1 << 15) + 1
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * width:
        pytest.skip("needs 20 GiB")
    x = torch.ones(rows, width, dtype=torch.float16, device="cuda")
    generator = torch.Generator().manual_seed(0)
    bank = random_bank(3, width, generator).cuda()
    mixes = random_mixes(2, 3, 1, generator).cuda()
    y = ops.scale(x, bank, mixes, torch.ones(1, dtype=torch.int32, device="cuda"))
    torch.testing.assert_close(y[-1:], ops.scale(x[:1], bank, mixes, torch.ones(1, dtype=torch.int32, device="cuda")))


def test_nothing_waits_for_the_device() -> None:
    layer = Layer(1024, 2048, torch.bfloat16)
    x, route = layer.randn(4, 16, 2048), layer.route("distinct", 4)
    layer(x, route)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, route)
    finally:
        torch.cuda.set_sync_debug_mode("default")
