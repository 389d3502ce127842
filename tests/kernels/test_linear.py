from dataclasses import replace

import pytest
import torch
from bar import Guarded, assert_meets_bar, sums_of
from grid import DTYPES, ROWS
from torch import Tensor
from workloads import LINEAR, POPULARITY, PRODUCT, Mix, mix_table, popularity, random_bank, random_mixes

from ia3rt import reference
from ia3rt.kernels import linear_tile
from ia3rt.kernels.configs import DESCRIPTOR_ARCHS, arch_of, linear_config
from ia3rt.kernels.launch import precision_of
from ia3rt.kernels.linear import linear
from ia3rt.kernels.linear_pair import are_alike, linear_pair
from ia3rt.kernels.linear_tma import fits_descriptors
from ia3rt.kernels.mixes import Routing
from ia3rt.kernels.tuned import LinearConfig, linear_configs

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
        sums = sums_of(x, **tensors, mixes=mixes, route=route)
        assert_meets_bar(result.out, reference.linear(x, **tensors, mixes=mixes, route=route), truth, sums)


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


@pytest.mark.parametrize(("rows", "size", "uniform"), [(5, 2, False), (20, 8, True)])
def test_an_input_scale_has_a_pass_before_torchs_matmul(rows, size, uniform, device) -> None:
    for arch in ("sm_80", "sm_90"):
        flags = {"per_row": not uniform, "scales_input": True, "descriptors": False}
        assert linear_config(rows, 77, 150, torch.bfloat16, arch, 132, **flags) is None
    layer = Layer(device, K=150, dtype=torch.bfloat16)
    mixes, route = layer.mixes(longest=size), layer.route("distinct", 1 if uniform else rows)
    layer.check(layer.randn(rows, layer.K), mixes, route, l_out=None)
    layer.check(layer.randn(rows, layer.K), mixes, route)


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
    config = linear_config(
        4096, 4096, 4096, torch.bfloat16, arch, 4, per_row=False, scales_input=False, descriptors=False
    )
    if device.type == "cuda" and arch != arch_of(device):
        config = replace(config, num_stages=2)  # another's pipeline may not fit this shared memory
    layer.check(layer.randn(140, layer.K), layer.mixes(), layer.route("uniform", 1), config=config, l_in=None)


def descriptor_config(rows: int, N: int, per_row: bool, device: torch.device) -> LinearConfig:
    if device.type == "cuda" and arch_of(device) not in DESCRIPTOR_ARCHS:
        pytest.skip("needs a GPU with a tensor memory accelerator")
    return linear_config(
        rows, N, 4096, torch.bfloat16, "sm_90", 132, per_row=per_row, scales_input=False, descriptors=True
    )


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("routed", "transposed", "bias"),
    [(1, False, True), (1, True, False), (2, False, True), (70, True, True), (140, False, True)],
)
def test_persistent_kernel(routed, transposed, bias, dtype, device) -> None:
    """More tiles than programs, and rows, columns and a K that end inside a block."""
    layer = Layer(device, N=432, K=136, dtype=dtype)
    config = descriptor_config(70, 1024, routed > 2, device)
    weight = layer.weight.t().contiguous().t() if transposed else layer.weight
    changes = {"weight": weight, "l_in": None} | ({} if bias else {"bias": None})
    config = replace(config, resident=1)  # in the interpreter: four programs
    rows = 270 if routed == 2 else 140  # in the second of three tiles another mix begins
    layer.check(layer.randn(rows, layer.K), layer.mixes(), layer.route("distinct", routed), config=config, **changes)


def test_persistent_kernel_with_a_wide_tile(device) -> None:
    layer = Layer(device, N=304, K=72, dtype=torch.bfloat16)
    config = descriptor_config(4096, 4096, False, device)
    assert config.block_n == 256
    layer.check(layer.randn(130, layer.K), layer.mixes(), layer.route("uniform", 1), config=config, l_in=None)


def test_what_descriptors_can_describe() -> None:
    def fits(x: Tensor, weight: Tensor, y: Tensor) -> bool:
        return fits_descriptors(x, [linear_tile.Layer(weight, None, None)], [y])

    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert fits(x, x, x)
    assert fits(x, x.t(), x)
    assert fits(x[:, 8:24], x[::2, :16], x)
    for wrong in (x[:, 1:], x[:, ::2], x[:1].expand(8, -1), torch.zeros(8, 60, dtype=torch.bfloat16)):
        assert not fits(wrong, x, x)
        assert not fits(x, wrong, x)
        assert not fits(x, x, wrong)
    assert not fits(x.t(), x, x)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("descriptors", [True, False])
def test_only_the_largest_batches_are_persistent(descriptors, arch) -> None:
    def config(rows: int, dtype: torch.dtype = torch.bfloat16, N: int = 4096) -> LinearConfig:
        flags = {"per_row": False, "scales_input": False, "descriptors": descriptors}
        return linear_config(rows, N, 4096, dtype, arch, 132, **flags)

    assert bool(config(65).resident) is (descriptors and arch == "sm_90")
    assert not config(64).resident and not config(4096, N=4088).resident
    assert config(65, torch.float32) is None and config(64, torch.float32)  # torch's own matmul


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "routed"), [(1, 1), (16, 16), (33, 1), (64, 64)])
@pytest.mark.parametrize("splits", [2, 7])
def test_split_sums(splits, rows, routed, dtype, device) -> None:
    """K ends inside a block; and where 7 programs share its 5 or 3 blocks, some have none."""
    layer = Layer(device, K=135, dtype=dtype)
    config = LinearConfig(16 if rows <= 16 else 64, 64, 32, 1, num_warps=4, num_stages=2, piece=32, splits=splits)
    layer.check(layer.randn(rows, layer.K), layer.mixes(), layer.route("zipf", routed), config=config)


def test_split_sums_are_the_same_bits_each_time(device) -> None:
    layer = Layer(device, N=64, K=2048, dtype=torch.bfloat16)
    x, routing = layer.randn(16, layer.K), (layer.mixes(), layer.route("distinct", 16))
    first = linear(x, layer.weight, layer.bias, None, layer.l_out, *routing)
    assert all(
        torch.equal(linear(x, layer.weight, layer.bias, None, layer.l_out, *routing), first)
        for _ in range(1 if device.type == "cpu" else 20)
    )


@pytest.mark.parametrize(
    ("rows", "N", "K", "splits"),
    [
        (16, 1024, 4096, 8),
        (64, 1024, 4096, 8),
        (16, 4096, 4096, 2),
        (1, 128, 576, 1),
        (16, 32, 65536, 128),
    ],
)
def test_few_tiles_are_shared(rows, N, K, splits) -> None:
    flags = {"per_row": True, "scales_input": False, "descriptors": True}
    assert linear_config(rows, N, K, torch.bfloat16, "sm_90", 132, **flags).splits == splits


H100 = "NVIDIA H100 80GB HBM3"


def shapes_where_rule_and_file_differ() -> dict[tuple[int, bool], tuple[LinearConfig | None, LinearConfig | None]]:
    differ = {}
    for shape, measured in linear_configs(H100).items():
        flags = shape._asdict() | {"dtype": getattr(torch, shape.dtype)}
        rule = linear_config(**flags, arch="sm_90", processors=132)
        if rule != measured and not shape.scales_input:
            differ[shape.rows, shape.per_row] = rule, measured
    return differ


def test_defaults_are_what_was_measured_on_an_h100() -> None:
    """Of Llama-3-8B's k and v all but these; where nothing was faster than the defaults then, there is no entry."""
    assert len(linear_configs(H100)) == 21
    differ = shapes_where_rule_and_file_differ()
    assert list(differ) == [(16, True), (512, False), (512, True), (1024, True)]
    rule, measured = differ[16, True]
    assert replace(rule, block_n=32) == measured
    rule, measured = differ[512, True]
    assert rule.block_n == 64 and measured is None
    for key in ((512, False), (1024, True)):
        rule, measured = differ[key]
        assert replace(rule, resident=2) == measured  # 128 tiles on 132 processors: the same launch


def test_many_rows_have_the_largest_tiles_that_give_each_processor_one() -> None:
    def config(rows: int, N: int, per_row: bool = False, processors: int = 132) -> LinearConfig | None:
        flags = {"per_row": per_row, "scales_input": False, "descriptors": True}
        return linear_config(rows, N, 4096, torch.bfloat16, "sm_90", processors, **flags)

    sizes = [(128, 64, 64), (256, 128, 64), (512, 128, 128), (2048, 128, 256), (4096, 128, 256)]
    assert [(rows, config(rows, 4096).block_m, config(rows, 4096).block_n) for rows, *_ in sizes] == sizes
    assert config(512, 4096, processors=78).block_n == 128
    assert config(512, 4096, per_row=True).piece == 16
    assert config(4096, 4096, per_row=True) is None  # torch multiplies, and a pass scales


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("rows_per_mix", [64, 65, 79, 96, 127])
def test_a_tile_of_two_mixes(rows_per_mix, block_m, device) -> None:
    """Whatever row of a tile the second mix begins at; mixes of up to four adapters, of none, and of both modes."""
    layer = Layer(device, N=48, K=32, dtype=torch.bfloat16)
    config = LinearConfig(block_m, 16, 32, 4, num_warps=4, num_stages=2, piece=16)
    route = torch.randperm(5, generator=layer.generator).to(device, torch.int32)
    x = layer.randn(5 * rows_per_mix, layer.K)
    layer.check(x, layer.mixes(), route, config=config, l_in=None)


@pytest.mark.parametrize("begin", range(1, 17))
def test_a_second_mix_begins_at_any_row_of_a_tile(begin, device) -> None:
    layer = Layer(device, N=16, K=16)
    config = LinearConfig(16, 16, 16, 4, num_warps=4, num_stages=2, piece=16)
    rows_per_mix = 16 + begin
    layer.check(layer.randn(3 * rows_per_mix, 16), layer.mixes(), layer.route("distinct", 3), config=config, l_in=None)


@pytest.mark.parametrize(
    ("rows", "mixes", "per_row"), [(256, 1, False), (256, 2, False), (256, 3, True), (64, 64, True)]
)
def test_which_rows_are_routed_as_sequences(rows, mixes, per_row) -> None:
    routing = Routing(rows, 8, None if mixes == 1 else rows // mixes, torch.empty(0), torch.empty(0))
    assert routing.per_row is per_row
    assert routing.two_mixes(64) is (mixes in (2, 3))


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


@pytest.mark.parametrize("M", [4, 20])
def test_a_long_sum(M, device) -> None:
    """Compiled, and here as then, fp32 is added one product after another: in parts it errs no more than torch does."""
    layer = Layer(device, N=64, K=14336)
    layer.check(layer.randn(M, layer.K), layer.mixes(), layer.route("uniform", M), l_in=None)


def check_pair(a: Layer, b: Layer, rows: int, route: Tensor, config=None, **changes: Tensor | None) -> None:
    """Compare two layers in one launch with the reference; `changes` are to the second."""
    x, mixes = a.randn(rows, a.K), a.mixes()
    layers = [
        {"weight": layer.weight, "bias": layer.bias, "l_out": layer.l_out} | changed
        for layer, changed in ((a, {}), (b, changes))
    ]
    results = [Guarded(rows, layer["weight"].shape[0], x.dtype, x.device) for layer in layers]
    out = results[0].out, results[1].out
    ours = linear_pair(x, *(tuple(layer.values()) for layer in layers), mixes, route, out=out, config=config)
    for y, result, layer in zip(ours, results, layers, strict=True):
        assert y is result.out
        result.assert_untouched()
        exact = {name: None if tensor is None else tensor.double() for name, tensor in layer.items()}
        truth = reference.linear(x.double(), **exact, l_in=None, mixes=mixes, route=route)
        sums = sums_of(x, **layer, l_in=None, mixes=mixes, route=route)
        assert_meets_bar(y, reference.linear(x, **layer, l_in=None, mixes=mixes, route=route), truth, sums)


def two_layers(device: torch.device, N: int, K: int, dtype: torch.dtype) -> tuple[Layer, Layer]:
    """Return layers that are alike but for their numbers."""
    a, b = (Layer(device, N, K, dtype) for _ in range(2))
    b.weight, b.bias = -2 * b.weight.flip(0), b.bias.flip(0)
    b.l_out = random_bank(CAPACITY, N, a.generator, before=1).to(device)
    return a, b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "routed"), [(1, 1), (16, 16), (33, 1), (129, 129)])
def test_pair(rows, routed, dtype, device) -> None:
    a, b = two_layers(device, 77, 135, dtype)
    check_pair(a, b, rows, a.route("distinct", routed))


@pytest.mark.parametrize("absent", [{}, {"bias": None}, {"l_out": None}, {"bias": None, "l_out": None}])
def test_pair_of_layers_that_are_not_alike(absent, device) -> None:
    a, b = two_layers(device, 40, 50, torch.float32)
    if absent:
        assert not are_alike_but(a, b, **absent)
    else:
        b = Layer(device, 24, 50)
        assert not are_alike_but(a, b)
    check_pair(a, b, 6, a.route("distinct", 6), **absent)


def are_alike_but(a: Layer, b: Layer, **changes: Tensor | None) -> bool:
    of_a, of_b = (linear_tile.Layer(layer.weight, layer.bias, layer.l_out) for layer in (a, b))
    return are_alike(of_a, of_b._replace(**changes))


@pytest.mark.parametrize("absent", [{}, {"bias": None}, {"l_out": None}])
@pytest.mark.parametrize("splits", [1, 3])
def test_pair_shares_sums(splits, absent, device) -> None:
    a, b = two_layers(device, 80, 135, torch.bfloat16)
    assert are_alike_but(a, b)
    for name in absent:
        setattr(a, name, None)
    config = LinearConfig(16, 64, 32, 1, num_warps=4, num_stages=2, piece=64, splits=splits)
    check_pair(a, b, 18, a.route("zipf", 18), config, **absent)


@pytest.mark.parametrize("resident", [1, 2])
@pytest.mark.parametrize("routed", [1, 140])
def test_persistent_pair(routed, resident, device) -> None:
    """In the interpreter, 16 tiles for 4 programs, or 12 for 8."""
    a, b = two_layers(device, 432 if resident == 1 else 336, 136, torch.bfloat16)
    config = replace(descriptor_config(70, 1024, routed > 1, device), resident=resident)
    check_pair(a, b, 140, a.route("zipf", routed), config)


def test_pair_of_conv1d_weights_in_the_persistent_kernel(device) -> None:
    a, b = two_layers(device, 144, 72, torch.bfloat16)
    for layer in (a, b):
        layer.weight = layer.weight.t().contiguous().t()
    check_pair(a, b, 130, a.route("uniform", 1), descriptor_config(70, 1024, False, device))


SETTINGS = {
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "fp32_precision of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "fp32_precision of CUDA's matmuls": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_fp32_is_rounded_where_torchs_matmuls_may_round_it_however_it_was_set(name) -> None:
    try:
        SETTINGS[name]()
        assert (precision_of(torch.float32), precision_of(torch.bfloat16)) == ("tf32", "ieee")
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert precision_of(torch.float32) == "ieee"
    assert not torch.backends.cuda.matmul.allow_tf32  # and no error
