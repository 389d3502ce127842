from dataclasses import replace

import pytest
import torch
from bar import Guarded, assert_meets_bar
from grid import DTYPES, ROWS
from torch import Tensor
from workloads import LINEAR, POPULARITY, PRODUCT, Mix, mix_table, popularity, random_bank, random_mixes

from ia3rt import ops, reference
from ia3rt.kernels.configs import DESCRIPTOR_ARCHS, arch_of, gate_up_config
from ia3rt.kernels.gate_up import gate_up
from ia3rt.kernels.gate_up_tma import fits_descriptors
from ia3rt.kernels.tuned import LinearConfig

KINDS = tuple(reference.ACTIVATIONS)
CAPACITY = 12
TENSORS = ("gate", "bias_gate", "up", "bias_up", "l")


class MLP:
    """The first half of an MLP with random weights, and a bank for the site behind it."""

    def __init__(self, device: torch.device, N: int = 77, K: int = 70, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype, self.N, self.K = device, dtype, N, K
        self.generator = torch.Generator().manual_seed(N)
        self.gate, self.up = 2 * self.randn(N, K) / K**0.5, self.randn(N, K) / K**0.5
        self.bias_gate, self.bias_up = self.randn(N), self.randn(N)
        self.l = random_bank(CAPACITY, N, self.generator, before=3).to(device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def mixes(self, slots: int = 9, longest: int = 4) -> Tensor:
        return random_mixes(slots, CAPACITY, longest, self.generator).to(self.device)

    def route(self, name: str, rows: int, slots: int = 9) -> Tensor:
        return popularity(name, rows, slots, self.generator).to(self.device)

    def check(self, x: Tensor, mixes: Tensor, route: Tensor, kind: str = "silu", config=None, **changes) -> None:
        """Compare the kernel with the reference, with some of the tensors exchanged."""
        tensors = [(dict(vars(self)) | changes)[name] for name in TENSORS]
        result = Guarded(x.shape[0], self.N, x.dtype, x.device)
        assert gate_up(x, *tensors, mixes, route, kind, out=result.out, config=config) is result.out
        result.assert_untouched()
        exact = [None if tensor is None else tensor.double() for tensor in tensors]
        truth = reference.gate_up(x.double(), *exact, mixes, route, kind)
        assert_meets_bar(result.out, reference.gate_up(x, *tensors, mixes, route, kind), truth)


@pytest.mark.parametrize("M", [4, 20])
def test_a_long_sum(M, device) -> None:
    """Compiled, and here as then, fp32 is added one product after another: in parts it errs no more than torch does."""
    mlp = MLP(device, N=64, K=4096)
    mlp.check(mlp.randn(M, mlp.K), mlp.mixes(), mlp.route("uniform", M))


NOT_GATED = {"up": None, "bias_up": None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", ROWS)
def test_rows(M, dtype, device) -> None:
    """129 rows of fp32 are torch's own matmuls, and the activation behind them."""
    mlp = MLP(device, dtype=dtype)
    mlp.check(mlp.randn(M, mlp.K), mlp.mixes(longest=2), mlp.route("distinct", M))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, gated, device) -> None:
    mlp = MLP(device, dtype=torch.bfloat16)
    changes = {} if gated else NOT_GATED
    mlp.check(mlp.randn(9, mlp.K), mlp.mixes(), mlp.route("uniform", 9), kind, **changes)


@pytest.mark.parametrize(("M", "gated", "dtype"), [(1, True, torch.float32), (33, False, torch.float16)])
def test_uniform_rows(M, gated, dtype, device) -> None:
    mlp = MLP(device, dtype=dtype)
    changes = {} if gated else NOT_GATED
    mlp.check(mlp.randn(M, mlp.K), mlp.mixes(), mlp.route("distinct", 1), "gelu_tanh", **changes)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (64, 32), (65, 33), (80, 144)])
def test_sizes_around_the_tile(N, K, uniform, device) -> None:
    mlp = MLP(device, N, K, torch.bfloat16)
    mlp.check(mlp.randn(18, K), mlp.mixes(), mlp.route("uniform", 1 if uniform else 18))


@pytest.mark.parametrize("name", POPULARITY)
def test_popularity(name, device) -> None:
    mlp = MLP(device, dtype=torch.bfloat16)
    mlp.check(mlp.randn(16, mlp.K), mlp.mixes(), mlp.route(name, 16))


@pytest.mark.parametrize("mode", [PRODUCT, LINEAR])
@pytest.mark.parametrize("uniform", [True, False])
def test_mixes_of_up_to_eight_adapters(uniform, mode, device) -> None:
    mlp = MLP(device, K=40)
    lengths = (8,) if uniform else range(9)
    weights = mlp.randn(8).tolist()
    mixes = mix_table([Mix(mode, range(1, 1 + n), weights[:n]) for n in lengths], size=8).to(device)
    mlp.check(mlp.randn(9, mlp.K), mixes, torch.arange(len(lengths), dtype=torch.int32, device=device))


@pytest.mark.parametrize(
    "absent", [("bias_gate",), ("bias_up",), ("l",), ("bias_gate", "bias_up"), ("up", "bias_up"), TENSORS[1:]]
)
def test_what_may_be_absent(absent, device) -> None:
    mlp = MLP(device, N=40, K=50)
    mlp.check(mlp.randn(6, mlp.K), mlp.mixes(), mlp.route("uniform", 3), **dict.fromkeys(absent))


@pytest.mark.parametrize("gate_first", [True, False])
def test_halves_of_a_fused_weight(gate_first, device) -> None:
    mlp = MLP(device, dtype=torch.bfloat16)
    halves = torch.cat([mlp.gate, mlp.up]).chunk(2)
    gate, up = halves if gate_first else reversed(halves)
    x, routing = mlp.randn(7, mlp.K), (mlp.mixes(), mlp.route("distinct", 7))
    mlp.check(x, *routing, gate=gate, up=up)
    apart = gate_up(x, gate.clone(), None, up.clone(), None, mlp.l, *routing, "silu")
    assert torch.equal(gate_up(x, gate, None, up, None, mlp.l, *routing, "silu"), apart)


def test_strided_operands(device) -> None:
    mlp = MLP(device)
    x = mlp.randn(8, 3 * mlp.K)[1:7, 5 : 5 + mlp.K]
    gate, up = mlp.randn(2, 2 * mlp.N, 3 * mlp.K)[:, ::2, ::3]
    mlp.check(x, mlp.mixes(), mlp.route("distinct", 6), gate=gate, up=up)
    mlp.check(x, mlp.mixes(), mlp.route("distinct", 6), up=up)  # other strides than gate's


@pytest.mark.parametrize("bank_dtype", [torch.float16, torch.bfloat16])
def test_bank_dtypes(bank_dtype, device) -> None:
    mlp = MLP(device, dtype=torch.bfloat16)
    mlp.check(mlp.randn(7, mlp.K), mlp.mixes(), mlp.route("distinct", 7), l=mlp.l.to(bank_dtype))


def config_of(arch: str, device: torch.device, rows: int = 256, **changes: bool) -> LinearConfig:
    if device.type == "cuda" and changes.get("descriptors") and arch_of(device) not in DESCRIPTOR_ARCHS:
        pytest.skip("needs a GPU with a tensor memory accelerator")
    flags = {"gated": True, "per_row": False, "two_mixes": False, "descriptors": False} | changes
    config = gate_up_config(rows, 4096, 4096, torch.bfloat16, arch, 132, **flags)
    if device.type == "cuda" and arch != arch_of(device):
        config = replace(config, num_stages=2)  # another's pipeline may not fit this shared memory
    return config


@pytest.mark.parametrize(("arch", "rows"), [("sm_80", 256), ("gfx942", 256), ("sm_90", 64), ("sm_90", 16)])
def test_configs_of_large_layers(arch, rows, device) -> None:
    """Those that small layers never choose. What only a compiler sees is in test_sass.py."""
    mlp = MLP(device, N=144, dtype=torch.bfloat16)
    mlp.check(mlp.randn(33, mlp.K), mlp.mixes(), mlp.route("uniform", 1), config=config_of(arch, device, rows))


def test_how_configs_are_chosen() -> None:
    def config(rows: int, N: int = 4096, dtype: torch.dtype = torch.bfloat16, **changes: bool) -> LinearConfig | None:
        flags = {"gated": True, "per_row": False, "two_mixes": False, "descriptors": True} | changes
        return gate_up_config(rows, N, 4096, dtype, "sm_90", 132, **flags)

    assert config(65, dtype=torch.float32) is None and config(64, dtype=torch.float32)  # torch's own matmul
    assert config(65, per_row=True) and config(4096, per_row=True) is None  # torch's, then the activation
    assert config(65, two_mixes=True).piece < config(65).piece
    assert config(65).resident == 1 and config(65, gated=False).resident == 2
    assert not config(64).resident and not config(65, N=4088).resident and not config(65, descriptors=False).resident
    assert config(16, N=1536).block_n == 16 and config(16, N=14336).block_n == 32  # at least a tile a processor


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("routed", "transposed", "gated"),
    [(1, False, True), (1, True, False), (2, False, True), (70, True, True), (140, False, False)],
)
def test_persistent_kernel(routed, transposed, gated, dtype, device) -> None:
    """More tiles than programs, and rows, columns and a K that end inside a block."""
    mlp = MLP(device, N=304, K=136, dtype=dtype)
    config = config_of("sm_90", device, gated=gated, per_row=routed > 2, two_mixes=routed == 2, descriptors=True)
    if transposed:
        mlp.gate, mlp.up = (weight.t().contiguous().t() for weight in (mlp.gate, mlp.up))
    changes = {} if gated else NOT_GATED
    config = replace(config, resident=1)  # in the interpreter: four programs
    rows = 270 if routed == 2 else 140  # in the second of three tiles another mix begins
    mlp.check(mlp.randn(rows, mlp.K), mlp.mixes(), mlp.route("distinct", routed), "gelu", config=config, **changes)


def test_persistent_kernel_on_halves_of_a_fused_weight(device) -> None:
    mlp = MLP(device, N=144, K=72, dtype=torch.bfloat16)
    gate, up = torch.cat([mlp.gate, mlp.up]).chunk(2)
    config = config_of("sm_90", device, descriptors=True)
    mlp.check(mlp.randn(130, mlp.K), mlp.mixes(), mlp.route("uniform", 1), config=config, gate=gate, up=up)


def test_what_descriptors_can_describe() -> None:
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    assert fits_descriptors(x, x, x, x)
    assert fits_descriptors(x, x, None, x)
    assert fits_descriptors(x, x.t(), x.t(), x)
    odd = torch.zeros(64, 60, dtype=torch.bfloat16)
    assert not fits_descriptors(x, x, x.t(), x)
    assert not any(fits_descriptors(*(odd if at == wrong else x for at in range(4))) for wrong in range(4))


def test_results_repeat_to_the_bit_and_a_row_is_the_same_in_any_batch(device) -> None:
    mlp = MLP(device, dtype=torch.bfloat16)
    x, mixes, route = mlp.randn(9, mlp.K), mlp.mixes(), mlp.route("distinct", 9)
    tensors = [getattr(mlp, name) for name in TENSORS]
    together = gate_up(x, *tensors, mixes, route, "silu")
    assert torch.equal(gate_up(x, *tensors, mixes, route, "silu"), together)
    for row in range(9):
        here = slice(row, row + 1)
        assert torch.equal(gate_up(x[here], *tensors, mixes, route[here], "silu"), together[here])


def test_a_zero_factor_is_zero_and_the_identity_is_exact(device) -> None:
    mlp = MLP(device, dtype=torch.bfloat16)
    mlp.l[1] = 0
    mixes = mix_table([Mix(PRODUCT, ()), Mix(PRODUCT, (0, 0)), Mix(PRODUCT, (2, 1)), Mix(LINEAR, ())]).to(device)
    x, route = mlp.randn(1, mlp.K).expand(4, -1), torch.arange(4, dtype=torch.int32, device=device)
    layers = mlp.gate, mlp.bias_gate, mlp.up, mlp.bias_up
    y = gate_up(x, *layers, mlp.l, mixes, route, "silu")
    assert torch.equal(y[:2], gate_up(x, *layers, None, mixes, route, "silu")[:2])
    assert (y[2:] == 0).all()


N, K = 5, 6
MIXES = mix_table([Mix(PRODUCT, ()), Mix(PRODUCT, (1, 2, 3)), Mix(LINEAR, (4, 1), (0.5, -2.0)), Mix(PRODUCT, (5,))])
ROUTES = {"uniform": [1], "a mix a sequence": [1, 2], "a mix a token": [3, 0, 1, 2, 2, 1]}


def inputs(
    device: torch.device, dtype: torch.dtype = torch.float32, gated: bool = True, N: int = N, K: int = K
) -> list[Tensor | None]:
    """Return x [2, 3, K], gate, its bias, up, its bias, and l."""
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 3, K), (N, K), (N,), (N, K), (N,)
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    l = random_bank(7, N, generator, torch.promote_types(dtype, torch.float32)).to(device)  # noqa: E741
    l[1, 0] = l[2, 0] = l[3, 1] = 0  # two factors of zero in one mix, and one
    if not gated:
        tensors[3:] = [None, None]
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in (*tensors, l)]


def routing_of(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    return MIXES.to(device), torch.tensor(ROUTES[name], dtype=torch.int32, device=device)


@pytest.mark.parametrize(("gated", "name"), [(True, "uniform"), (True, "a mix a token"), (False, "a mix a sequence")])
def test_opcheck(gated, name, device) -> None:
    torch.library.opcheck(ops.gate_up.op, (*inputs(device, gated=gated), *routing_of(name, device), "silu"))


@pytest.mark.usefixtures("torch_backend")
def test_opcheck_in_torch() -> None:
    cpu = torch.device("cpu")
    torch.library.opcheck(
        ops.gate_up.op, (*inputs(cpu, torch.bfloat16), *routing_of("a mix a sequence", cpu), "quick_gelu")
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, gated) -> None:
    cpu = torch.device("cpu")
    tensors, routing = inputs(cpu, torch.float64, gated), routing_of("a mix a token", cpu)
    for run in (ops.gate_up, reference.gate_up):
        assert torch.autograd.gradcheck(lambda *t, run=run: run(*t, *routing, kind), tensors)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_kernels(dtype, gated, device) -> None:
    """Each gradient errs at most twice as much as torch's own autograd does; the weights are halves of one tensor."""

    def gradients(run, dtype: torch.dtype) -> list[Tensor]:
        x, gate, bias_gate, up, bias_up, l = inputs(device, N=65, K=40)  # noqa: E741  (the same values for each dtype, rounded)
        rounded = [t.detach().to(torch.bfloat16).to(dtype) for t in (x, torch.cat([gate, up]), bias_gate, bias_up)]
        x, fused, bias_gate, bias_up = (tensor.requires_grad_() for tensor in rounded)
        l = l.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()  # noqa: E741
        gate, up = fused.chunk(2)
        layers = (gate, bias_gate, up, bias_up) if gated else (gate, bias_gate, None, None)
        y = run(x, *layers, l, *routing_of("a mix a token", device), "gelu")
        dy = torch.linspace(-1, 2, y.numel(), device=device).to(torch.bfloat16).to(dtype).view(y.shape)
        return list(torch.autograd.grad(y, (x, fused, bias_gate, l, *([bias_up] if gated else [])), dy))

    truths = gradients(reference.gate_up, torch.float64)
    for ours, theirs, truth in zip(
        gradients(ops.gate_up, dtype), gradients(reference.gate_up, dtype), truths, strict=True
    ):
        assert_meets_bar(ours, theirs, truth)


@pytest.mark.parametrize("needed", range(6))
def test_only_needed_gradients_are_returned(needed, device) -> None:
    tensors = [tensor.detach() for tensor in inputs(device)]
    tensors[needed].requires_grad_()
    ops.gate_up(*tensors, *routing_of("a mix a sequence", device), "gelu").sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [place == needed for place in range(6)]


def test_shapes_and_strides_of_x(device) -> None:
    _, *fixed = (*(tensor.detach() for tensor in inputs(device)), *routing_of("uniform", device), "silu")
    x = torch.randn(K, 4, 2, device=device).permute(2, 1, 0)  # columns apart
    y = ops.gate_up(x, *fixed)
    assert y.shape == (2, 4, N) and y.is_contiguous()
    assert torch.equal(y, ops.gate_up(x.contiguous(), *fixed))
    torch.testing.assert_close(ops.gate_up(x[0, 0], *fixed), y[0, 0])
    empty = x[:0].detach().requires_grad_()
    ops.gate_up(empty, *fixed).sum().backward()
    assert empty.grad.shape == (0, 4, K)


def test_torch_compile_leaves_the_op_whole(device) -> None:
    tensors, routing = inputs(device), routing_of("a mix a sequence", device)
    compiled = torch.compile(lambda *args: ops.gate_up(*args, "gelu_tanh") + 1, fullgraph=True, backend="aot_eager")
    y, eager = compiled(*tensors, *routing), ops.gate_up(*tensors, *routing, "gelu_tanh") + 1
    torch.testing.assert_close(y, eager, rtol=0, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(run.sum(), tensors) for run in (y, eager)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mish"}, "kind must be one of silu, gelu, gelu_tanh, relu, relu2, quick_gelu, not 'mish'"),
        ({"x": torch.ones(2, 3, K + 1)}, r"x \[2, 3, 7\] does not fit weight \[5, 6\]"),
        ({"up": torch.ones(N + 1, K), "bias_up": None}, r"up must have the shape of gate, \[5, 6\], not \[6, 6\]"),
        ({"up": torch.ones(N, K).half()}, "x, weight and bias must have one dtype"),
        ({"up": None}, "bias_up is given without up"),
        ({"l": torch.ones(7, K)}, r"l must be a bank slice of shape \[capacity, 5\], not \[7, 6\]"),
        ({"mixes": MIXES.long()}, "mixes must be a contiguous int32 tensor"),
        ({"route": torch.zeros(4, dtype=torch.int32)}, "the 6 rows of x cannot be divided"),
    ],
)
def test_wrong_arguments(change, message, device) -> None:
    names = ("x", *TENSORS, "mixes", "route", "kind")
    arguments = (*(tensor.detach() for tensor in inputs(device)), *routing_of("uniform", device), "silu")
    changed = dict(zip(names, arguments, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        ops.gate_up(*(value.to(device) if isinstance(value, Tensor) else value for value in changed.values()))
