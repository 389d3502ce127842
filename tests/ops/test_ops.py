import subprocess
import sys

import pytest
import torch
from bar import assert_meets_bar
from torch import Tensor
from workloads import LINEAR, PRODUCT, Mix, mix_table, popularity, random_bank, random_mixes

from ia3rt import ops, reference

CAPACITY, K, N = 7, 6, 5
MIXES = mix_table([Mix(PRODUCT, ()), Mix(PRODUCT, (1, 2, 3)), Mix(LINEAR, (4, 1), (0.5, -2.0)), Mix(PRODUCT, (5,))])
ROUTES = {"uniform": [1], "a mix a sequence": [1, 2], "a mix a token": [3, 0, 1, 2, 2, 1]}


def inputs(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    grad: bool = True,
    bias: bool = True,
    sites: str = "in out",
) -> list[Tensor | None]:
    """Return x [2, 3, K], weight, bias, l_in and l_out."""
    generator = torch.Generator().manual_seed(1)
    bank_dtype = torch.promote_types(dtype, torch.float32)
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, K), (N, K), (N,))]
    tensors: list[Tensor | None] = [tensor.to(device, dtype).requires_grad_(grad) for tensor in drawn]
    for site, width in (("in", K), ("out", N)):
        vectors = random_bank(CAPACITY, width, generator, bank_dtype).to(device).detach()
        tensors.append(vectors.requires_grad_(grad) if site in sites else None)
    if not bias:
        tensors[2] = None
    return tensors


def route_of(name: str, device: torch.device) -> Tensor:
    return torch.tensor(ROUTES[name], dtype=torch.int32, device=device)


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("sites", ["", "in", "out", "in out"])
def test_opcheck_linear(sites, name, device) -> None:
    tensors = inputs(device, bias=name != "uniform", sites=sites)
    torch.library.opcheck(ops.linear.op, (*tensors, MIXES.to(device), route_of(name, device)))


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_linear_in_torch(dtype) -> None:
    tensors = inputs(torch.device("cpu"), dtype)
    torch.library.opcheck(ops.linear.op, (*tensors, MIXES, route_of("a mix a sequence", torch.device("cpu"))))


def pair_inputs(device: torch.device, dtype: torch.dtype = torch.float32, N_b: int = N) -> list[Tensor | None]:
    """Return x [2, 3, K], and weight, bias and l_out of two layers."""
    x, weight, bias, _, l_out = inputs(device, dtype)
    generator = torch.Generator().manual_seed(2)
    second = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((N_b, K), (N_b,))]
    second.append(random_bank(CAPACITY, N_b, generator, l_out.dtype).to(device).detach())
    return [x, weight, bias, l_out, *(tensor.requires_grad_() for tensor in second)]


@pytest.mark.parametrize("N_b", [N, N + 2])
@pytest.mark.parametrize("name", ROUTES)
def test_opcheck_linear_pair(name, N_b, device) -> None:
    tensors = pair_inputs(device, N_b=N_b)
    if name == "a mix a sequence":
        tensors[2] = tensors[5] = tensors[6] = None
    torch.library.opcheck(ops.linear_pair.op, (*tensors, MIXES.to(device), route_of(name, device)))


@pytest.mark.parametrize("name", ROUTES)
def test_gradcheck_linear_pair(name) -> None:
    cpu = torch.device("cpu")
    routing = MIXES, route_of(name, cpu)
    tensors = pair_inputs(cpu, torch.float64, N_b=N + 1)
    assert torch.autograd.gradcheck(lambda *t: ops.linear_pair(*t, *routing), tensors)
    tensors[0].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *t: ops.linear_pair(*t, *routing), tensors)


def test_linear_pair_is_two_linear_layers(device) -> None:
    x, weight_a, bias_a, l_a, weight_b, bias_b, l_b = pair_inputs(device)
    routing = MIXES.to(device), route_of("a mix a token", device)
    y_a, y_b = ops.linear_pair(x, weight_a, bias_a, l_a, weight_b, bias_b, l_b, *routing)
    torch.testing.assert_close(y_a, ops.linear(x, weight_a, bias_a, None, l_a, *routing))
    torch.testing.assert_close(y_b, ops.linear(x, weight_b, bias_b, None, l_b, *routing))
    assert y_a.shape == y_b.shape == (2, 3, N)
    y_a.sum().backward()  # and nothing of y_b
    assert weight_a.grad is not None and not weight_b.grad.any()
    empty = ops.linear_pair(x[:0], weight_a, bias_a, l_a, weight_b, bias_b, l_b, *routing)
    assert [y.shape for y in empty] == 2 * [(0, 3, N)]
    with pytest.raises(ValueError, match="l_out must be a bank slice"):
        ops.linear_pair(x, weight_a, bias_a, l_a, weight_b, bias_b, l_b[:, 1:], *routing)


@pytest.mark.parametrize("name", ROUTES)
def test_opcheck_scale_and_bank_gradient(name, device) -> None:
    x, _, _, bank, _ = inputs(device)
    routing = MIXES.to(device), route_of(name, device)
    torch.library.opcheck(ops.scale.op, (x, bank, *routing))
    torch.library.opcheck(ops.bank_gradient.op, (x.detach(), x.detach(), bank.detach(), *routing))


@pytest.mark.parametrize("name", ROUTES)
def test_gradcheck(name) -> None:
    cpu = torch.device("cpu")
    tensors = inputs(cpu, torch.float64)
    with torch.no_grad():
        tensors[3][1, 0] = tensors[4][1, :2] = tensors[4][2, 1] = 0  # one zero factor, and two
    routing = MIXES, route_of(name, cpu)
    assert torch.autograd.gradcheck(lambda *t: ops.linear(*t, *routing), tensors, fast_mode=False)
    assert torch.autograd.gradcheck(lambda x, bank: ops.scale(x, bank, *routing), (tensors[0], tensors[3]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_the_kernels(dtype, name, transposed, device) -> None:
    """Each gradient, with the kernels inside, errs at most twice as much as torch's own autograd does."""

    def gradients(run, dtype: torch.dtype) -> list[Tensor]:
        tensors = inputs(device, torch.float32)  # the same values for each dtype, rounded
        x, weight, bias = (t.detach().to(torch.bfloat16).to(dtype).requires_grad_() for t in tensors[:3])
        l_in, l_out = (t.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for t in tensors[3:])
        matrix = weight.t().contiguous().t() if transposed else weight
        y = run(x, matrix, bias, l_in, l_out, MIXES.to(device), route_of(name, device))
        dy = torch.linspace(-1, 2, y.numel(), device=device).to(torch.bfloat16).to(dtype).view(y.shape)
        return list(torch.autograd.grad(y, (x, weight, bias, l_in, l_out), dy))

    truths = gradients(reference.linear, torch.float64)
    for ours, theirs, truth in zip(
        gradients(ops.linear, dtype), gradients(reference.linear, dtype), truths, strict=True
    ):
        assert_meets_bar(ours, theirs, truth)


def test_only_needed_gradients_are_computed(device) -> None:
    tensors = inputs(device, grad=False)
    tensors[4].requires_grad_()
    ops.linear(*tensors, MIXES.to(device), route_of("uniform", device)).sum().backward()
    assert tensors[4].grad is not None
    assert all(tensor.grad is None for tensor in tensors[:4])


def test_a_gradient_reaches_the_bank_through_its_slices(device) -> None:
    x, weight, bias, l_in, l_out = inputs(device)
    bank = torch.cat([l_in, l_out], 1).detach().requires_grad_()
    routing = MIXES.to(device), route_of("a mix a token", device)
    ops.linear(x, weight, bias, bank[:, :K], bank[:, K:], *routing).sum().backward()
    apart = torch.autograd.grad(ops.linear(x, weight, bias, l_in, l_out, *routing).sum(), (l_in, l_out))
    torch.testing.assert_close(bank.grad, torch.cat(apart, 1), rtol=0, atol=0)


def test_bank_gradients_are_the_same_bits_each_time(device) -> None:
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(64, 33, generator=generator).to(device) for _ in range(2))
    bank = random_bank(5, 33, generator).to(device)
    routing = random_mixes(6, 5, 4, generator).to(device), popularity("zipf", 64, 6, generator).to(device)
    first = ops.bank_gradient(dy, x, bank, *routing)
    assert all(torch.equal(ops.bank_gradient(dy, x, bank, *routing), first) for _ in range(5))


def test_shapes_and_strides_of_x(device) -> None:
    _, weight, bias, l_in, l_out = inputs(device, grad=False)
    fixed = (weight, bias, l_in, l_out, MIXES.to(device), route_of("uniform", device))
    x = torch.randn(K, 4, 2, device=device).permute(2, 1, 0)  # columns apart
    y = ops.linear(x, *fixed)
    assert y.shape == (2, 4, N) and y.is_contiguous()
    torch.testing.assert_close(y, ops.linear(x.contiguous(), *fixed), rtol=0, atol=0)
    torch.testing.assert_close(ops.linear(x[0, 0], *fixed), y[0, 0])
    assert ops.linear(x[:0], *fixed).shape == (0, 4, N)
    assert ops.scale(x[:0], l_in, *fixed[-2:]).shape == (0, 4, K)


@pytest.mark.parametrize("expanded", [False, True])
def test_biases_of_any_stride(expanded, device) -> None:
    """As the parts of a fused bias lie, and one number for all."""
    x, weight, _, _, l_out = inputs(device, grad=False)
    bias = torch.tensor([2.0], device=device).expand(N) if expanded else torch.randn(N, 3, device=device)[:, 2]
    routed = MIXES.to(device), route_of("uniform", device)
    y = x.double() @ weight.double().t() + bias.double()
    truth = reference.scale(y, l_out.double(), *routed)
    torch.testing.assert_close(ops.linear(x, weight, bias, None, l_out, *routed), truth.float())
    for part in ops.linear_pair(x, weight, bias, l_out, weight, bias, l_out, *routed):
        torch.testing.assert_close(part, truth.float())
    gated = ops.gate_up(x, weight, bias, weight, bias, l_out, *routed, "relu")
    torch.testing.assert_close(gated, reference.scale(y.relu() * y, l_out.double(), *routed).float())


@pytest.mark.usefixtures("torch_backend")
def test_autocast_leaves_an_op_the_dtype_of_its_arguments() -> None:
    tensors = inputs(torch.device("cpu"))
    routed = MIXES, route_of("uniform", torch.device("cpu"))
    truth = ops.linear(*tensors, *routed)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(*tensors, *routed)
        with torch.no_grad():
            assert torch.equal(ops.linear(*tensors, *routed), truth)
    assert torch.equal(y, truth)
    y.sum().backward()


@pytest.mark.parametrize("K", [0, 2])
@pytest.mark.parametrize("N", [0, 2])
@pytest.mark.parametrize("run", ["kernels", "torch"])
def test_matrices_without_rows_or_columns(run, N, K, device, monkeypatch) -> None:
    if run == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight, other = (torch.ones(rows, K, device=device) for rows in (3, N, 2))
    bias, l_out, routed = torch.ones(N, device=device), torch.ones(CAPACITY, N, device=device), (MIXES.to(device),)
    routed += (route_of("uniform", device),)
    truth, of_other = (torch.full((3, rows), K + 1.0, device=device) for rows in (N, 2))
    with torch.no_grad():
        assert torch.equal(ops.linear(x, weight, bias, None, l_out, *routed), truth)
        pair = ops.linear_pair(x, weight, bias, l_out, other, torch.ones(2, device=device), None, *routed)
        assert torch.equal(pair[0], truth) and torch.equal(pair[1], of_other)
        assert torch.equal(ops.gate_up(x, weight, bias, None, None, l_out, *routed, "relu"), truth)
        assert ops.scale(truth, l_out, *routed).shape == truth.shape


def test_torch_compile_leaves_the_op_whole(device) -> None:
    tensors = inputs(device, grad=False)
    routing = MIXES.to(device), route_of("a mix a sequence", device)
    compiled = torch.compile(lambda *args: ops.linear(*args) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, *routing), ops.linear(*tensors, *routing) + 1, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, K + 1)}, r"x \[2, 3, 7\] does not fit weight \[5, 6\]"),
        ({"weight": torch.ones(N, K, dtype=torch.float64)}, "must have one dtype"),
        ({"bias": torch.ones(N + 1)}, r"bias must have shape \[5\]"),
        ({"l_in": torch.ones(CAPACITY, N)}, r"l_in must be a bank slice of shape \[capacity, 6\], not \[7, 5\]"),
        ({"l_out": torch.ones(N)}, r"l_out must be a bank slice of shape \[capacity, 5\], not \[5\]"),
        ({"l_out": torch.ones(N, CAPACITY).t()}, "l_out must have contiguous columns"),
        ({"mixes": MIXES.long()}, "mixes must be a contiguous int32 tensor"),
        ({"mixes": MIXES[:, :5]}, "mixes must be a contiguous int32 tensor"),
        (
            {"route": torch.zeros(4, dtype=torch.int32)},
            "the 6 rows of x cannot be divided among the 4 entries of route",
        ),
        (
            {"route": torch.zeros(0, dtype=torch.int32)},
            "the 6 rows of x cannot be divided among the 0 entries of route",
        ),
        ({"route": torch.zeros(1)}, "route must be a contiguous int32 tensor"),
    ],
)
def test_wrong_arguments(change, message, device) -> None:
    names = ("x", "weight", "bias", "l_in", "l_out", "mixes", "route")
    arguments = dict(zip(names, (*inputs(device, grad=False), MIXES, route_of("uniform", device)), strict=True))
    arguments = {name: value.to(device) for name, value in (arguments | change).items()}
    arguments |= {name: value for name, value in change.items() if name == "l_out"}  # .to() would make it contiguous
    with pytest.raises(ValueError, match=message):
        ops.linear(*arguments.values())


def mlp_inputs(
    device: torch.device, dtype: torch.dtype = torch.float32, gated: bool = True, scaled: bool = True
) -> list[Tensor | None]:
    """Return gate [2, 3, K], up and l."""
    generator = torch.Generator().manual_seed(2)
    gate, up = (torch.randn(2, 3, K, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2))
    l = random_bank(CAPACITY, K, generator, torch.promote_types(dtype, torch.float32)).to(device)  # noqa: E741
    l[1, 0] = l[2, 0] = l[3, 1] = 0  # two factors of zero in one mix, and one
    tensors = [gate, up if gated else None, l.detach() if scaled else None]
    return [tensor if tensor is None else tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize(
    ("gated", "scaled", "name"),
    [(True, True, "uniform"), (True, False, "a mix a sequence"), (False, True, "a mix a token")],
)
def test_opcheck_activation(gated, scaled, name, device) -> None:
    tensors = mlp_inputs(device, gated=gated, scaled=scaled)
    arguments = MIXES.to(device), route_of(name, device), "silu"
    torch.library.opcheck(ops.activation.op, (*tensors, *arguments))
    tensors = [tensor if tensor is None else tensor.detach() for tensor in (tensors[0], *tensors)]
    torch.library.opcheck(ops.activation_gradient.op, (*tensors, *arguments))


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize("kind", ["silu", "quick_gelu"])
def test_opcheck_activation_in_torch(kind) -> None:
    cpu = torch.device("cpu")
    arguments = *mlp_inputs(cpu, torch.bfloat16), MIXES, route_of("a mix a sequence", cpu), kind
    torch.library.opcheck(ops.activation.op, arguments)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_gradcheck_activation(kind, gated) -> None:
    cpu = torch.device("cpu")
    tensors = mlp_inputs(cpu, torch.float64, gated)
    routing = MIXES, route_of("a mix a sequence", cpu)
    for run in (ops.activation, reference.activation):
        assert torch.autograd.gradcheck(lambda *t, run=run: run(*t, *routing, kind), tensors)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_the_activation_kernels(dtype, kind, gated, device) -> None:
    """Each gradient errs at most twice as much as torch's own autograd does; gate and up are halves of one tensor."""

    def gradients(run, dtype: torch.dtype) -> list[Tensor]:
        gate, up, l = mlp_inputs(device)  # noqa: E741  (the same values for each dtype, rounded)
        fused = torch.cat([up, gate], -1).detach().to(torch.bfloat16).to(dtype).requires_grad_()
        l = l.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()  # noqa: E741
        up, gate = fused.chunk(2, -1)
        y = run(gate, up if gated else None, l, MIXES.to(device), route_of("a mix a token", device), kind)
        dy = torch.linspace(-1, 2, y.numel(), device=device).to(torch.bfloat16).to(dtype).view(y.shape)
        return list(torch.autograd.grad(y, (fused, l), dy))

    truths = gradients(reference.activation, torch.float64)
    for ours, theirs, truth in zip(
        gradients(ops.activation, dtype), gradients(reference.activation, dtype), truths, strict=True
    ):
        # The vector's is a sum over rows, of numbers as large as others' sums, and torch's of six rows may be lucky.
        # A GPU's fast exponential errs by some ulps.
        sums = torch.full_like(truth, 4 * torch.finfo(ours.dtype).eps * float(truth.abs().max()))
        assert_meets_bar(ours, theirs, truth, sums)


@pytest.mark.parametrize("needed", range(3))
def test_only_needed_gradients_of_an_activation_are_returned(needed, device) -> None:
    tensors = [tensor.detach() for tensor in mlp_inputs(device)]
    tensors[needed].requires_grad_()
    ops.activation(*tensors, MIXES.to(device), route_of("a mix a sequence", device), "gelu").sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [place == needed for place in range(3)]


def test_gradients_of_an_activation_are_the_same_bits_each_time(device) -> None:
    tensors = mlp_inputs(device)
    y = ops.activation(*tensors, MIXES.to(device), route_of("a mix a token", device), "silu")
    first, again = (torch.autograd.grad(y.sum(), tensors, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_shapes_and_strides_of_gate_and_up(device) -> None:
    _, _, l = mlp_inputs(device)  # noqa: E741
    fixed = l.detach(), MIXES.to(device), route_of("uniform", device), "silu"
    gate, up = torch.randn(2, K, 4, 2, device=device).permute(0, 3, 2, 1)  # columns apart
    y = ops.activation(gate, up, *fixed)
    assert y.shape == (2, 4, K) and y.is_contiguous()
    torch.testing.assert_close(y, ops.activation(gate.contiguous(), up.contiguous(), *fixed), rtol=0, atol=0)
    torch.testing.assert_close(ops.activation(gate[0, 0], up[0, 0], *fixed), y[0, 0])
    assert ops.activation(gate[:0], up[:0], *fixed).shape == (0, 4, K)
    empty = gate[:0].detach().requires_grad_()
    ops.activation(empty, None, *fixed).sum().backward()
    assert empty.grad.shape == (0, 4, K)


def test_torch_compile_leaves_the_activation_and_its_gradient_whole(device) -> None:
    tensors = mlp_inputs(device)
    routing = MIXES.to(device), route_of("a mix a sequence", device)
    compiled = torch.compile(lambda *args: ops.activation(*args, "gelu_tanh") + 1, fullgraph=True, backend="aot_eager")
    y, eager = compiled(*tensors, *routing), ops.activation(*tensors, *routing, "gelu_tanh") + 1
    torch.testing.assert_close(y, eager, rtol=0, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(run.sum(), tensors) for run in (y, eager)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mish"}, "kind must be one of silu, gelu, gelu_tanh, relu, relu2, quick_gelu, not 'mish'"),
        ({"gate": torch.tensor(1.0)}, "gate must have at least one dimension"),
        (
            {"up": torch.ones(2, 3, N)},
            r"up must be as gate is, torch.float32 \[2, 3, 6\], not torch.float32 \[2, 3, 5\]",
        ),
        ({"up": torch.ones(2, 3, K).half()}, r"up must be as gate is, .* not torch.float16 \[2, 3, 6\]"),
        ({"l": torch.ones(CAPACITY, N)}, r"l must be a bank slice of shape \[capacity, 6\], not \[7, 5\]"),
        ({"mixes": MIXES.long()}, "mixes must be a contiguous int32 tensor"),
        ({"route": torch.zeros(4, dtype=torch.int32)}, "the 6 rows of x cannot be divided"),
    ],
)
def test_wrong_arguments_of_an_activation(change, message, device) -> None:
    names = ("gate", "up", "l", "mixes", "route", "kind")
    arguments = (*(tensor.detach() for tensor in mlp_inputs(device)), MIXES, route_of("uniform", device), "silu")
    changed = dict(zip(names, arguments, strict=True)) | change
    moved = [value if isinstance(value, str) else value.to(device) for value in changed.values()]
    with pytest.raises(ValueError, match=message):
        ops.activation(*moved)
    with pytest.raises(ValueError, match=message):
        ops.activation_gradient(torch.ones_like(moved[0]), *moved)


@pytest.mark.usefixtures("torch_backend")
def test_dispatch_on_the_cpu() -> None:
    assert ops.backend(torch.ones(1)) == "torch"


def test_dispatch_where_the_kernels_run(device) -> None:
    assert ops.backend(torch.ones(1, device=device)) == "triton"
    assert ops.backend(torch.ones(1, device=device, dtype=torch.float64)) == "torch"


def test_works_where_triton_is_not_installed() -> None:
    program = """
import os, sys
sys.modules["triton"] = None  # importing it raises ModuleNotFoundError
os.environ["TRITON_INTERPRET"] = "1"
import torch
from ia3rt import ops
x, weight, route = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(1, dtype=torch.int32)
y = ops.linear(x, weight, None, None, torch.full((1, 4), 2.0), torch.tensor([[0, 1, 0, 0]], dtype=torch.int32), route)
assert ops.backend(x) == "torch" and (y == 6).all()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_compose_is_exact_in_float64() -> None:
    bank = random_bank(6, 4, torch.Generator().manual_seed(0))
    mixes = mix_table(
        [Mix(PRODUCT, ()), Mix(PRODUCT, (1, 2)), Mix(LINEAR, (3, 4, 0), (0.25, -1.5, 2.0)), Mix(LINEAR, ())]
    )
    b = bank.double()
    expected = torch.stack([torch.ones(4).double(), b[1] * b[2], 0.25 * b[3] - 1.5 * b[4] + 2, torch.zeros(4).double()])
    torch.testing.assert_close(reference.compose(bank, mixes, torch.float64), expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(reference.compose(bank, mixes), expected.float())


def test_a_call_that_only_wants_the_result_goes_past_the_dispatcher(device) -> None:
    """And gets the same; what looks on at the dispatcher, still sees the op."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        seen: tuple[str, ...] = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += (str(func),)
            return func(*args, **(kwargs or {}))

    tensors = [tensor.detach() for tensor in inputs(device, torch.float32)]
    arguments = (*tensors, MIXES.to(device), route_of("uniform", device))
    with torch.no_grad():
        y = ops.linear(*arguments)
        assert torch.equal(y, ops.linear.op(*arguments))
        with Recorder() as recorder:
            ops.linear(*arguments)
        assert "ia3rt.linear.default" in recorder.seen
    assert not y.requires_grad
    tensors[0].requires_grad_()
    assert ops.linear(*tensors, *arguments[5:]).requires_grad
