"""The operations as torch.library custom ops: dispatch (triton | torch), shapes for tracing, and gradients.

    torch.ops.ia3rt.scale        y = s ∘ x
    torch.ops.ia3rt.linear       y = s_out ∘ (W (s_in ∘ x) + b)
    torch.ops.ia3rt.linear_pair  y_a = s_a ∘ (W_a x + b_a), y_b = s_b ∘ (W_b x + b_b)
    torch.ops.ia3rt.activation   y = s ∘ act(gate) ∘ up

Triton runs what is on a GPU, and anything where TRITON_INTERPRET=1; reference.py runs the rest, and all of it where
Triton is not installed. The layouts of a bank's slice, of `mixes` and of `route` are in reference.py. Ids and slots are
not checked to be in range: they live on the device, and reading them would stall it.
"""

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ia3rt import reference

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def _kernels_work() -> bool:
    """Whether Triton is installed: a failure of another kind is no reason to be silently slow."""
    try:
        importlib.import_module("ia3rt.kernels.linear")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return False
    return True


def backend(x: Tensor) -> Literal["triton", "torch"]:
    """Return what computes an operation on x."""
    on_device = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if on_device and x.dtype in TRITON_DTYPES and _kernels_work() else "torch"


def _module(name: str, x: Tensor) -> Any:
    """Return kernels/<name>.py, or reference.py, which has a stand-in for each of its launchers."""
    return importlib.import_module(f"ia3rt.kernels.{name}") if backend(x) == "triton" else reference


def _implementation(name: str, x: Tensor) -> Callable[..., Tensor]:
    """Return kernels/<name>.py's launcher `name`, or what stands in for it."""
    run: Callable[..., Tensor] = getattr(_module(name, x), name)
    return run


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _flat(x: Tensor) -> Tensor:
    """Return x as [M, width] with contiguous columns: a view wherever one exists."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _new(x: Tensor, width: int) -> Tensor:
    """Return what every op returns: [..., width], contiguous, uninitialised."""
    return x.new_empty((*x.shape[:-1], width))


def _check_site(name: str, l: Tensor | None, width: int) -> None:  # noqa: E741
    if l is None:
        return
    if l.ndim != 2 or l.shape[1] != width:
        raise ValueError(f"{name} must be a bank slice of shape [capacity, {width}], not {list(l.shape)}")
    if l.stride(1) != 1 and width > 1:
        raise ValueError(f"{name} must have contiguous columns; its strides are {list(l.stride())}")


def _check_routing(mixes: Tensor, route: Tensor) -> None:
    is_table = mixes.ndim == 2 and mixes.shape[1] >= 2 and mixes.shape[1] % 2 == 0
    if mixes.dtype != torch.int32 or not is_table or not mixes.is_contiguous():
        raise ValueError(
            f"mixes must be a contiguous int32 tensor [slots, 2 + 2K], not {mixes.dtype} {list(mixes.shape)}"
        )
    if route.dtype != torch.int32 or route.ndim != 1 or not route.is_contiguous():
        raise ValueError(f"route must be a contiguous int32 tensor [R], not {route.dtype} {list(route.shape)}")


def _check_rows(rows: int, route: Tensor) -> None:
    if route.shape[0] == 0 or rows % route.shape[0]:
        raise ValueError(f"the {rows} rows of x cannot be divided among the {route.shape[0]} entries of route")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, l_in: Tensor | None, l_out: Tensor | None) -> None:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} does not fit weight {list(weight.shape)}: [..., K_in] and [N, K_in] do")
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], not {list(bias.shape)}")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        dtypes = f"{x.dtype}, {weight.dtype}" + (f", {bias.dtype}" if bias is not None else "")
        raise ValueError(f"x, weight and bias must have one dtype, not {dtypes}")
    _check_site("l_in", l_in, weight.shape[1])
    _check_site("l_out", l_out, weight.shape[0])


def _check_activation(gate: Tensor, up: Tensor | None, l: Tensor | None, kind: str) -> None:  # noqa: E741
    if kind not in reference.ACTIVATIONS:
        raise ValueError(f"kind must be one of {', '.join(reference.ACTIVATIONS)}, not {kind!r}")
    if gate.ndim == 0:
        raise ValueError("gate must have at least one dimension")
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise ValueError(f"up must be as gate is, {gate.dtype} {list(gate.shape)}, not {up.dtype} {list(up.shape)}")
    _check_site("l", l, gate.shape[-1])


def _check_scale(x: Tensor, l: Tensor) -> None:  # noqa: E741
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    _check_site("l", l, x.shape[-1])


@torch.library.custom_op("ia3rt::scale", mutates_args=())
def scale(x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    """Return s ∘ x in x.dtype, computed in fp32 and rounded once.

    Args:
        x: [..., width], any strides.
        l: [capacity, width], a bank slice with contiguous columns.
        mixes: int32 [slots, 2 + 2K].
        route: int32 [R]; the number of rows of x is a multiple of R.

    Raises:
        ValueError: a shape, dtype or layout is another.

    """
    _check_scale(x, l)
    _check_routing(mixes, route)
    rows = _flat(x)
    _check_rows(rows.shape[0], route)
    if x.numel() == 0:
        return _new(x, x.shape[-1])
    with _device_of(x):
        y = _implementation("scale", x)(rows, l, mixes, route)
    return y.view(x.shape)


@scale.register_fake
def _(x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    _check_scale(x, l)
    _check_routing(mixes, route)
    return _new(x, x.shape[-1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _scale_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, l, mixes, route = ctx.saved_tensors  # noqa: E741
    dx = scale(dy, l, mixes, route) if ctx.needs_input_grad[0] else None
    dl = bank_gradient(dy, x, l, mixes, route) if ctx.needs_input_grad[1] else None
    return dx, dl, None, None


scale.register_autograd(_scale_backward, setup_context=_save_inputs)


@torch.library.custom_op("ia3rt::bank_gradient", mutates_args=())
def bank_gradient(dy: Tensor, x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    """Return dL/dl as [capacity, width] of l.dtype, given dL/dy for y = s ∘ x; see reference.bank_gradient.

    An op of its own so that torch.compile leaves it whole: taken apart, its sums would be atomic adds on a GPU.
    """
    if x.numel() == 0:
        return torch.zeros(l.shape, dtype=l.dtype, device=l.device)
    return reference.bank_gradient(dy, x, l, mixes, route)


@bank_gradient.register_fake
def _(dy: Tensor, x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    return torch.empty(l.shape, dtype=l.dtype, device=l.device)


@torch.library.custom_op("ia3rt::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
) -> Tensor:
    """Return s_out ∘ (W (s_in ∘ x) + b) in x.dtype.

    Args:
        x: [..., K_in], any strides.
        weight: [N, K_in], any strides (a Conv1D passes weight.t()).
        bias: [N] or None.
        l_in: [capacity, K_in], a bank slice with contiguous columns, or None for no scale on x.
        l_out: [capacity, N], the same for the output.
        mixes: int32 [slots, 2 + 2K].
        route: int32 [R]; the number of rows of x is a multiple of R.

    x, weight and bias have one dtype; a bank slice may have another. The result is contiguous.

    Raises:
        ValueError: a shape, dtype or layout is another.

    """
    _check_linear(x, weight, bias, l_in, l_out)
    _check_routing(mixes, route)
    rows = _flat(x)
    _check_rows(rows.shape[0], route)
    if x.numel() == 0:
        return _new(x, weight.shape[0])
    with _device_of(x):
        y = _implementation("linear", x)(rows, weight, bias, l_in, l_out, mixes, route)
    return y.view(*x.shape[:-1], weight.shape[0])


@linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
) -> Tensor:
    _check_linear(x, weight, bias, l_in, l_out)
    _check_routing(mixes, route)
    return _new(x, weight.shape[0])


def _linear_gradients(
    dy: Tensor, inputs: tuple[Any, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Chain the gradients of s_in ∘ x, of W · + b, and of the output's scale, each only where it is needed.

    What the output's scale multiplied, W (s_in ∘ x) + b, is computed again rather than kept: it is as large as y, and
    y / s_out would be wrong where a factor is zero.

    Args:
        dy: [..., N].
        inputs: those of `linear`.
        needs: whether the gradients of x, weight, bias, l_in and l_out are needed.

    """
    x, weight, bias, l_in, l_out, mixes, route = inputs
    need_x, need_weight, need_bias, need_l_in, need_l_out = needs
    dx = dweight = dbias = dl_in = dl_out = None
    scaled = x if l_in is None or not (need_weight or need_l_out) else scale(x, l_in, mixes, route)
    if need_l_out:
        dl_out = bank_gradient(dy, F.linear(scaled, weight, bias), l_out, mixes, route)
    dz = dy if l_out is None else scale(dy, l_out, mixes, route)
    if need_weight:
        dweight = dz.reshape(-1, dz.shape[-1]).t() @ scaled.reshape(-1, x.shape[-1])
    if need_bias:
        dbias = dz.reshape(-1, dz.shape[-1]).sum(0)
    if need_x or need_l_in:
        dx = dz @ weight
        dl_in = bank_gradient(dx, x, l_in, mixes, route) if need_l_in else None
        dx = dx if l_in is None else scale(dx, l_in, mixes, route)
    return dx, dweight, dbias, dl_in, dl_out


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_linear_gradients(dy, ctx.saved_tensors, ctx.needs_input_grad[:5]), None, None


linear.register_autograd(_linear_backward, setup_context=_save_inputs)


@torch.library.custom_op("ia3rt::linear_pair", mutates_args=())
def linear_pair(
    x: Tensor,
    weight_a: Tensor,
    bias_a: Tensor | None,
    l_a: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    l_b: Tensor | None,
    mixes: Tensor,
    route: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return (s_a ∘ (W_a x + b_a), s_b ∘ (W_b x + b_b)) in x.dtype: k and v, from one launch where they are alike.

    Args:
        x: [..., K_in], any strides.
        weight_a: [N_a, K_in], any strides (a Conv1D passes weight.t()).
        bias_a: [N_a] or None.
        l_a: [capacity, N_a], the output site's bank slice with contiguous columns, or None.
        weight_b: as weight_a; N_b may be another.
        bias_b: as bias_a.
        l_b: as l_a.
        mixes: int32 [slots, 2 + 2K].
        route: int32 [R]; the number of rows of x is a multiple of R.

    x, weights and biases have one dtype; a bank slice may have another. The results are contiguous.

    Raises:
        ValueError: a shape, dtype or layout is another.

    """
    _check_linear(x, weight_a, bias_a, None, l_a)
    _check_linear(x, weight_b, bias_b, None, l_b)
    _check_routing(mixes, route)
    rows = _flat(x)
    _check_rows(rows.shape[0], route)
    if x.numel() == 0:
        return _new(x, weight_a.shape[0]), _new(x, weight_b.shape[0])
    with _device_of(x):
        run = _module("linear_pair", x).linear_pair
        y_a, y_b = run(rows, (weight_a, bias_a, l_a), (weight_b, bias_b, l_b), mixes, route)
    return y_a.view(*x.shape[:-1], weight_a.shape[0]), y_b.view(*x.shape[:-1], weight_b.shape[0])


@linear_pair.register_fake
def _(
    x: Tensor,
    weight_a: Tensor,
    bias_a: Tensor | None,
    l_a: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    l_b: Tensor | None,
    mixes: Tensor,
    route: Tensor,
) -> tuple[Tensor, Tensor]:
    _check_linear(x, weight_a, bias_a, None, l_a)
    _check_linear(x, weight_b, bias_b, None, l_b)
    _check_routing(mixes, route)
    return _new(x, weight_a.shape[0]), _new(x, weight_b.shape[0])


def _linear_pair_backward(ctx: Any, dy_a: Tensor, dy_b: Tensor) -> tuple[Tensor | None, ...]:
    """Add what the two layers send back to x; the rest is each layer's own."""
    x, *layers, mixes, route = ctx.saved_tensors
    need_x, *needs = ctx.needs_input_grad[:7]
    gradients = []
    for dy, first in ((dy_a, 0), (dy_b, 3)):
        (weight, bias, l_out), (of_weight, of_bias, of_l) = layers[first : first + 3], needs[first : first + 3]
        inputs = (x, weight, bias, None, l_out, mixes, route)
        gradients.append(_linear_gradients(dy, inputs, (need_x, of_weight, of_bias, False, of_l)))
    (dx_a, dweight_a, dbias_a, _, dl_a), (dx_b, dweight_b, dbias_b, _, dl_b) = gradients
    dx = None if dx_a is None or dx_b is None else dx_a + dx_b
    return dx, dweight_a, dbias_a, dl_a, dweight_b, dbias_b, dl_b, None, None


linear_pair.register_autograd(_linear_pair_backward, setup_context=_save_inputs)


@torch.library.custom_op("ia3rt::activation", mutates_args=())
def activation(
    gate: Tensor,
    up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: str,
) -> Tensor:
    """Return s ∘ act(gate) ∘ up in gate.dtype.

    Args:
        gate: [..., width], any strides.
        up: [..., width] of gate.dtype, any strides; or None where the MLP is not gated.
        l: [capacity, width], a bank slice with contiguous columns, or None for no scale.
        mixes: int32 [slots, 2 + 2K].
        route: int32 [R]; the number of rows of gate is a multiple of R.
        kind: one of reference.ACTIVATIONS.

    gate and up may be the halves of one tensor: rows any stride apart are read in place. The result is contiguous.

    Raises:
        ValueError: a shape, dtype, layout or kind is another.

    """
    _check_activation(gate, up, l, kind)
    _check_routing(mixes, route)
    rows = _flat(gate)
    _check_rows(rows.shape[0], route)
    if gate.numel() == 0:
        return _new(gate, gate.shape[-1])
    with _device_of(gate):
        run = _implementation("activation", gate)
        y = run(rows, None if up is None else _flat(up), l, mixes, route, kind)
    return y.view(gate.shape)


@activation.register_fake
def _(
    gate: Tensor,
    up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: str,
) -> Tensor:
    _check_activation(gate, up, l, kind)
    _check_routing(mixes, route)
    return _new(gate, gate.shape[-1])


@torch.library.custom_op("ia3rt::activation_gradient", mutates_args=())
def activation_gradient(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: str,
) -> list[Tensor]:
    """Return [dL/dgate], and dL/dup behind it where there is an up, given dL/dy for y = activation(gate, up, …)."""
    if gate.numel() == 0:
        return [_new(gate, gate.shape[-1]) for _ in range(1 if up is None else 2)]
    with _device_of(gate):
        run = _module("activation", gate).activation_gradient
        gradients = run(_flat(dy), _flat(gate), None if up is None else _flat(up), l, mixes, route, kind)
    return [gradient.view(gate.shape) for gradient in gradients]


@activation_gradient.register_fake
def _(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: str,
) -> list[Tensor]:
    return [_new(gate, gate.shape[-1]) for _ in range(1 if up is None else 2)]


def _save_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _activation_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """What the scale multiplied, act(gate) ∘ up, is computed again for its gradient, as in _linear_backward."""
    gate, up, l, mixes, route = ctx.saved_tensors  # noqa: E741
    need_gate, need_up, need_l, *_ = ctx.needs_input_grad
    dgate = dup = dl = None
    if need_gate or need_up:
        dgate, *dups = activation_gradient(dy, gate, up, l, mixes, route, ctx.kind)
        dup = dups[0] if dups else None
    if need_l:
        dl = bank_gradient(dy, activation(gate, up, None, mixes, route, ctx.kind), l, mixes, route)
    return dgate, dup, dl, None, None, None


activation.register_autograd(_activation_backward, setup_context=_save_activation)
