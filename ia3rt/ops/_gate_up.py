"""torch.ops.ia3rt.gate_up."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ia3rt import reference
from ia3rt.ops._activation import activation, activation_gradient
from ia3rt.ops._checks import check_routing, check_rows, check_site
from ia3rt.ops._dispatch import device_of, flat, implementation, new, side_by_side
from ia3rt.ops._linear import check_linear, linear_gradients
from ia3rt.ops._op import custom_op
from ia3rt.ops._scale import bank_gradient


def _check_gate_up(
    x: Tensor,
    gate: Tensor,
    bias_gate: Tensor | None,
    up: Tensor | None,
    bias_up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    kind: str,
) -> None:
    if kind not in reference.ACTIVATIONS:
        raise ValueError(f"kind must be one of {', '.join(reference.ACTIVATIONS)}, not {kind!r}")
    check_linear(x, gate, bias_gate, None, None)
    if up is not None:
        check_linear(x, up, bias_up, None, None)
        if up.shape != gate.shape:
            raise ValueError(f"up must have the shape of gate, {list(gate.shape)}, not {list(up.shape)}")
    elif bias_up is not None:
        raise ValueError("bias_up is given without up")
    check_site("l", l, gate.shape[0])


@custom_op("ia3rt::gate_up")
def gate_up(
    x: Tensor,
    gate: Tensor,
    bias_gate: Tensor | None,
    up: Tensor | None,
    bias_up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: str,
) -> Tensor:
    """Return s ∘ act(W_gate x + b_gate) ∘ (W_up x + b_up) in x.dtype.

    Args:
        x: [..., K_in], any strides.
        gate: [N, K_in], any strides (a Conv1D passes weight.t()).
        bias_gate: [N], any stride, or None.
        up: as gate, two tensors or the halves of one; or None where the MLP is not gated. One launch computes both
            where they have the same strides.
        bias_up: as bias_gate.
        l: [capacity, N], a bank slice with contiguous columns, or None for no scale.
        mixes: int32 [slots, 2 + 2K].
        route: int32 [R]; the number of rows of x is a multiple of R.
        kind: one of reference.ACTIVATIONS.

    x, weights and biases have one dtype; a bank slice may have another. The result is contiguous. Nothing but the
    arguments is kept for the gradient, which computes W_gate x + b_gate and W_up x + b_up again.

    Raises:
        ValueError: a shape, dtype, layout or kind is another.

    """
    _check_gate_up(x, gate, bias_gate, up, bias_up, l, kind)
    check_routing(mixes, route)
    rows = flat(x)
    check_rows(rows.shape[0], route)
    if 0 in (rows.shape[0], gate.shape[0]):
        return new(x, gate.shape[0])
    biases = side_by_side(bias_gate), side_by_side(bias_up)
    with device_of(x):
        y = implementation("gate_up", x)(rows, gate, biases[0], up, biases[1], l, mixes, route, kind)
    return y.view(*x.shape[:-1], gate.shape[0])


@gate_up.register_fake
def _(
    x: Tensor,
    gate: Tensor,
    bias_gate: Tensor | None,
    up: Tensor | None,
    bias_up: Tensor | None,
    l: Tensor | None,  # noqa: E741
    mixes: Tensor,
    route: Tensor,
    kind: str,
) -> Tensor:
    _check_gate_up(x, gate, bias_gate, up, bias_up, l, kind)
    check_routing(mixes, route)
    return new(x, gate.shape[0])


def _save_gate_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _gate_up_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Chain the gradients of the activation and of the two matrices, each only where it is needed.

    What the activation read is computed again rather than kept: it is twice as large as y.
    """
    x, gate, bias_gate, up, bias_up, l, mixes, route = ctx.saved_tensors  # noqa: E741
    need_x, *needs, need_l = ctx.needs_input_grad[:6]
    z_gate = F.linear(x, gate, bias_gate)
    z_up = None if up is None else F.linear(x, up, bias_up)
    dl = None
    if need_l:
        dl = bank_gradient(dy, activation(z_gate, z_up, None, mixes, route, ctx.kind), l, mixes, route)
    if not (need_x or any(needs)):
        return *[None] * 5, dl, None, None, None
    dz = activation_gradient(dy, z_gate, z_up, l, mixes, route, ctx.kind)
    dx = None
    gradients: list[Tensor | None] = []
    for d, weight, bias, needed in zip(dz, (gate, up), (bias_gate, bias_up), (needs[:2], needs[2:]), strict=False):
        layer = x, weight, bias, None, None, mixes, route
        d_x, d_weight, d_bias, *_ = linear_gradients(d, layer, (need_x, *needed, False, False))
        gradients += [d_weight, d_bias]
        dx = d_x if dx is None or d_x is None else dx + d_x
    return dx, *(gradients + 2 * [None])[:4], dl, None, None, None


gate_up.register_autograd(_gate_up_backward, setup_context=_save_gate_up)
