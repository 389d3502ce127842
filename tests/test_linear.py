from dataclasses import replace

import pytest
import torch
from bar import Guarded, assert_meets_bar
from torch import Tensor
from workloads import LINEAR, POPULARITY, PRODUCT, Mix, mix_table, popularity, random_bank, random_mixes

from ia3rt import reference
from ia3rt.kernels.configs import arch_of, linear_config
from ia3rt.kernels.linear import fuses_input, linear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (1, 2, 7, 16, 33, 64, 129)
CAPACITY = 12


class Layer:
    """A linear layer with random weights, and a bank for its two sites."""

    def __init__(self, device: torch.device, N: int = 77, K: int = 135, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype, self.N, self.K = device, dtype, N, K
        self.generator = torch.Generator().manual_seed(N)
        self.weight = self.randn(N, K) / K**0.5
        self.bias = self.randn(N)
        self.l_in = random_bank(CAPACITY, K, self.generator, before=3).to(device)
        self.l_out = random_bank(CAPACITY, N, self.generator, before=1).to(device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def mixes(self, slots: int = 9, longest: int = 4) -> Tensor:
        return random_mixes(slots, CAPACITY, longest, self.generator).to(self.device)

    def route(self, name: str, rows: int, slots: int = 9) -> Tensor:
        return popularity(name, rows, slots, self.generator).to(self.device)

    def check(self, x: Tensor, mixes: Tensor, route: Tensor, config=None, **changes: Tensor | None) -> None:
        """Compare the kernel with the reference, with some of the layer's tensors exchanged."""
        tensors = {name: getattr(self, name) for name in ("weight", "bias", "l_in", "l_out")} | changes
        result = Guarded(x.shape[0], self.N, x.dtype, x.device)
        assert linear(x, **tensors, mixes=mixes, route=route, out=result.out, config=config) is result.out
        result.assert_untouched()
        exact = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
        truth = reference.linear(x.double(), **exact, mixes=mixes, route=route)
        assert_meets_bar(result.out, reference.linear(x, **tensors, mixes=mixes, route=route), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", ROWS)
def test_rows(M, dtype, device) -> None:
    layer = Layer(device, dtype=dtype)
    layer.check(layer.randn(M, layer.K), layer.mixes(), layer.route("distinct", M))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 33, 129])
def test_uniform_rows(M, dtype, device) -> None:
    layer = Layer(device, dtype=dtype)
    layer.check(layer.randn(M, layer.K), layer.mixes(), layer.route("distinct", 1))


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("N", "K"), [(150, 200), (1, 1), (128, 64), (129, 65)])
def test_sizes_around_the_tile(N, K, uniform, device) -> None:
    layer = Layer(device, N, K, torch.bfloat16)
    layer.check(layer.randn(130, K), layer.mixes(), layer.route("uniform", 1 if uniform else 130))


@pytest.mark.parametrize("name", POPULARITY)
def test_popularity(name, device) -> None:
    layer = Layer(device, dtype=torch.bfloat16)
    layer.check(layer.randn(16, layer.K), layer.mixes(), layer.route(name, 16))


@pytest.mark.parametrize("rows_per_mix", [2, 9])
def test_one_mix_a_sequence(rows_per_mix, device) -> None:
    layer = Layer(device)
    layer.check(layer.randn(4 * rows_per_mix, layer.K), layer.mixes(), layer.route("distinct", 4))


@pytest.mark.parametrize("mode", [PRODUCT, LINEAR])
@pytest.mark.parametrize("uniform", [True, False])
def test_mixes_of_up_to_eight_adapters(uniform, mode, device) -> None:
    layer = Layer(device, K=70)
    lengths = (8,) if uniform else range(9)
    weights = layer.randn(8).tolist()
    mixes = mix_table([Mix(mode, range(1, 1 + n), weights[:n]) for n in lengths], size=8).to(device)
    layer.check(layer.randn(9, layer.K), mixes, torch.arange(len(lengths), dtype=torch.int32, device=device))


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("has_out", [True, False])
@pytest.mark.parametrize("has_in", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_what_may_be_absent(has_bias, has_in, has_out, uniform, device) -> None:
    layer = Layer(device, N=40, K=50)
    absent = {"bias": has_bias, "l_in": has_in, "l_out": has_out}
    changes = {name: None for name, present in absent.items() if not present}
    layer.check(layer.randn(6, layer.K), layer.mixes(longest=2), layer.route("uniform", 1 if uniform else 6), **changes)


@pytest.mark.parametrize(
    ("rows", "size", "uniform", "fused"),
    [(5, 2, False, True), (5, 3, False, False), (20, 1, False, True), (20, 2, False, False), (20, 8, True, True)],
)
def test_input_scale_inside_and_before_the_gemm(rows, size, uniform, fused, device) -> None:
    assert fuses_input(rows, size, uniform) is fused
    layer = Layer(device, K=150, dtype=torch.bfloat16)
    layer.check(layer.randn(rows, layer.K), layer.mixes(longest=size), layer.route("distinct", 1 if uniform else rows))


def test_more_than_32_rows_are_scaled_before_the_gemm() -> None:
    assert fuses_input(32, 1, uniform=True)
    assert not fuses_input(33, 1, uniform=True)


@pytest.mark.parametrize("rows", [7, 40])
def test_conv1d_weight_is_read_transposed(rows, device) -> None:
    layer = Layer(device, dtype=torch.bfloat16)
    weight = layer.weight.t().contiguous().t()
    layer.check(layer.randn(rows, layer.K), layer.mixes(), layer.route("zipf", rows), weight=weight)


def test_strided_operands(device) -> None:
    layer = Layer(device)
    x = layer.randn(8, 3 * layer.K)[1:7, 5 : 5 + layer.K]
    weight = layer.randn(2 * layer.N, 3 * layer.K)[::2, ::3]
    layer.check(x, layer.mixes(), layer.route("distinct", 6), weight=weight)


@pytest.mark.parametrize("bank_dtype", [torch.float16, torch.bfloat16])
def test_bank_dtypes(bank_dtype, device) -> None:
    layer = Layer(device, dtype=torch.bfloat16)
    bank = {"l_in": layer.l_in.to(bank_dtype), "l_out": layer.l_out.to(bank_dtype)}
    layer.check(layer.randn(7, layer.K), layer.mixes(longest=2), layer.route("distinct", 7), **bank)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_configs_of_large_batches(arch, device) -> None:
    """Those that few rows never choose, on few rows. What only a compiler sees is in test_sass.py."""
    layer = Layer(device, N=300, dtype=torch.bfloat16)
    config = linear_config(4096, 4096, 4096, torch.bfloat16, arch, per_row=False, scales_input=False)
    if device.type == "cuda" and arch != arch_of(device):
        config = replace(config, num_stages=2)  # another's pipeline may not fit this shared memory
    layer.check(layer.randn(140, layer.K), layer.mixes(), layer.route("uniform", 1), config=config, l_in=None)


def test_a_zero_factor_is_zero_and_the_identity_is_exact(device) -> None:
    layer = Layer(device, dtype=torch.bfloat16)
    layer.l_out[1] = 0
    mixes = mix_table([Mix(PRODUCT, ()), Mix(PRODUCT, (0, 0)), Mix(PRODUCT, (2, 1)), Mix(LINEAR, ())]).to(device)
    x = layer.randn(1, layer.K).expand(4, -1)
    route = torch.arange(4, dtype=torch.int32, device=device)
    y = linear(x, layer.weight, layer.bias, None, layer.l_out, mixes, route)
    plain = linear(x, layer.weight, layer.bias, None, None, mixes, route)
    assert torch.equal(y[:2], plain[:2])
    assert (y[2:] == 0).all()
