import pytest
import torch
from bar import Guarded, assert_meets_bar
from grid import DTYPES, ROWS
from torch import Tensor
from workloads import LINEAR, POPULARITY, PRODUCT, Mix, mix_table, popularity, random_bank, random_mixes

from ia3rt import reference
from ia3rt.kernels.activation import activation, activation_gradient

KINDS = tuple(reference.ACTIVATIONS)
CAPACITY = 12


class Site:
    """A bank for an MLP's second matrix, and random inputs for it."""

    def __init__(self, device: torch.device, N: int = 77, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype, self.N = device, dtype, N
        self.generator = torch.Generator().manual_seed(N)
        self.l = random_bank(CAPACITY, N, self.generator, before=3).to(device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def pair(self, M: int) -> tuple[Tensor, Tensor]:
        """A gate that covers both tails of each activation, and an up."""
        return 3 * self.randn(M, self.N), self.randn(M, self.N)

    def mixes(self, slots: int = 9, longest: int = 4) -> Tensor:
        return random_mixes(slots, CAPACITY, longest, self.generator).to(self.device)

    def route(self, name: str, rows: int, slots: int = 9) -> Tensor:
        return popularity(name, rows, slots, self.generator).to(self.device)


def exact(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def check(gate: Tensor, up: Tensor | None, l: Tensor | None, mixes: Tensor, route: Tensor, kind: str = "silu") -> None:  # noqa: E741
    """Compare the kernel and its gradients with the reference."""
    result = Guarded(*gate.shape, gate.dtype, gate.device)
    assert activation(gate, up, l, mixes, route, kind, out=result.out) is result.out
    result.assert_untouched()
    truth = reference.activation(*exact(gate, up, l), mixes, route, kind)
    assert_meets_bar(result.out, reference.activation(gate, up, l, mixes, route, kind), truth)

    dy = torch.linspace(-1, 2, gate.numel(), device=gate.device).to(gate.dtype).view(gate.shape)
    results = [Guarded(*gate.shape, gate.dtype, gate.device) for _ in range(1 if up is None else 2)]
    activation_gradient(dy, gate, up, l, mixes, route, kind, out=[result.out for result in results])
    truths = reference.activation_gradient(*exact(dy, gate, up, l), mixes, route, kind)
    in_torch = reference.activation_gradient(dy, gate, up, l, mixes, route, kind)
    for result, theirs, truth in zip(results, in_torch, truths, strict=True):
        result.assert_untouched()
        assert_meets_bar(result.out, theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, gated, dtype, device) -> None:
    site = Site(device, dtype=dtype)
    gate, up = site.pair(9)
    check(gate, up if gated else None, site.l, site.mixes(), site.route("uniform", 9), kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", ROWS)
def test_rows(M, dtype, device) -> None:
    site = Site(device, dtype=dtype)
    check(*site.pair(M), site.l, site.mixes(longest=2), site.route("distinct", M), "gelu_tanh")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("M", [1, 33, 129])
def test_uniform_rows(M, gated, device) -> None:
    site = Site(device, dtype=torch.bfloat16)
    gate, up = site.pair(M)
    check(gate, up if gated else None, site.l, site.mixes(), site.route("distinct", 1))


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("N", [1, 255, 256, 257, 512, 1025])
def test_widths_around_the_tile(N, uniform, device) -> None:
    site = Site(device, N, torch.bfloat16)
    check(*site.pair(3), site.l, site.mixes(), site.route("distinct", 1 if uniform else 3))


@pytest.mark.parametrize("name", POPULARITY)
@pytest.mark.parametrize("rows_per_mix", [1, 3])
def test_popularity(name, rows_per_mix, device) -> None:
    site = Site(device, 33)
    check(*site.pair(10 * rows_per_mix), site.l, site.mixes(), site.route(name, 10))


@pytest.mark.parametrize("mode", [PRODUCT, LINEAR])
@pytest.mark.parametrize("uniform", [True, False])
def test_mixes_of_up_to_eight_adapters(uniform, mode, device) -> None:
    site = Site(device, 40)
    lengths = (8,) if uniform else range(9)
    weights = site.randn(8).tolist()
    mixes = mix_table([Mix(mode, range(1, 1 + n), weights[:n]) for n in lengths], size=8).to(device)
    check(*site.pair(9), site.l, mixes, torch.arange(len(lengths), dtype=torch.int32, device=device))


@pytest.mark.parametrize("bank_dtype", DTYPES)
def test_bank_dtypes(bank_dtype, device) -> None:
    site = Site(device, dtype=torch.bfloat16)
    check(*site.pair(5), site.l.to(bank_dtype), site.mixes(), site.route("distinct", 5))


@pytest.mark.parametrize("gated", [True, False])
def test_no_scale(gated, device) -> None:
    site = Site(device, dtype=torch.float16)
    gate, up = site.pair(5)
    check(gate, up if gated else None, None, site.mixes(), site.route("distinct", 5))


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("N", [64, 77])
def test_halves_of_a_fused_tensor(N, gate_first, device) -> None:
    site = Site(device, N, torch.bfloat16)
    halves = site.randn(7, 2 * N).split(N, dim=1)
    gate, up = halves if gate_first else reversed(halves)
    routing = site.mixes(), site.route("distinct", 7)
    check(gate, up, site.l, *routing)
    apart = activation(gate.contiguous(), up.contiguous(), site.l, *routing, "silu")
    assert torch.equal(activation(gate, up, site.l, *routing, "silu"), apart)


def test_strided_rows(device) -> None:
    site = Site(device)
    gate, up = site.randn(12, 3 * site.N)[::2, 5 : 5 + site.N], site.randn(1, site.N).expand(6, -1)
    check(gate, up, site.l, site.mixes(), site.route("distinct", 6), "relu2")


def test_a_row_is_the_same_alone_and_in_any_batch(device) -> None:
    site = Site(device, 300, torch.bfloat16)
    (gate, up), mixes, route = site.pair(9), site.mixes(), site.route("distinct", 9)
    together = activation(gate, up, site.l, mixes, route, "gelu")
    for row in range(9):
        here = slice(row, row + 1)
        assert torch.equal(activation(gate[here], up[here], site.l, mixes, route[here], "gelu"), together[here])


def test_a_zero_factor_is_zero_and_the_identity_is_exact(device) -> None:
    site = Site(device, dtype=torch.bfloat16)
    site.l[1] = 0
    mixes = mix_table([Mix(PRODUCT, ()), Mix(PRODUCT, (0, 0)), Mix(PRODUCT, (2, 1)), Mix(LINEAR, ())]).to(device)
    gate, up = (tensor[:1].expand(4, -1) for tensor in site.pair(1))
    route = torch.arange(4, dtype=torch.int32, device=device)
    y = activation(gate, up, site.l, mixes, route, "silu")
    plain = activation(gate, up, None, mixes, route, "silu")
    assert torch.equal(y[:2], plain[:2])
    assert (y[2:] == 0).all()


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter computes in numpy
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_inputs_saturate(dtype, kind, device) -> None:
    """Both tails, as far as the dtype goes: the value and the slope are those of the limit, never a NaN.

    So are torch's in fp16's range; beyond it, its slope of gelu_tanh is NaN.
    """
    sizes = torch.tensor([20.0, 88, 89, 104, 1e3, 38600, 65504, 1e10, 1.9e19, 3e38])
    sizes = sizes[sizes <= torch.finfo(dtype).max].to(device, dtype)
    gate = torch.stack([sizes, -sizes])
    mixes, route = mix_table([Mix(PRODUCT, ())]).to(device), torch.zeros(1, dtype=torch.int32, device=device)
    y = activation(gate, None, None, mixes, route, kind)
    (slope,) = activation_gradient(torch.ones_like(gate), gate, None, None, mixes, route, kind)
    positive, gain = (sizes.square(), 2 * sizes) if kind == "relu2" else (sizes, torch.ones_like(sizes))
    torch.testing.assert_close(y, torch.stack([positive, 0 * sizes]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(slope, torch.stack([gain, 0 * sizes]), atol=1e-6, rtol=1e-6)

    usual = gate[:, sizes <= 65504].contiguous()
    in_torch = reference.activation(usual, None, None, mixes, route, kind)
    (torch_slope,) = reference.activation_gradient(torch.ones_like(usual), usual, None, None, mixes, route, kind)
    torch.testing.assert_close(in_torch, y[:, : usual.shape[1]], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch_slope, slope[:, : usual.shape[1]], atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_stays_one(kind, device) -> None:
    gate = torch.tensor([[1.0, float("nan"), float("inf")]], device=device)
    mixes, route = mix_table([Mix(PRODUCT, ())]).to(device), torch.zeros(1, dtype=torch.int32, device=device)
    y = activation(gate, None, None, mixes, route, kind)
    assert y.isnan().tolist() == [[False, True, False]] and y[0, 2] == float("inf")


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_what_transformers_computes(kind) -> None:
    theirs = pytest.importorskip("transformers.activations").ACT2FN[
        "gelu_pytorch_tanh" if kind == "gelu_tanh" else kind
    ]
    z = torch.linspace(-9, 9, 301).to(torch.bfloat16)
    assert torch.equal(reference.ACTIVATIONS[kind](z), theirs(z))
