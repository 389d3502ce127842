"""torch.ops.ia3rt.activation."""

from typing import Any

from torch import Tensor

from ia3rt import reference
from ia3rt.ops._checks import check_routing, check_rows, check_site
from ia3rt.ops._dispatch import device_of, flat, implementation, module, new
from ia3rt.ops._op import custom_op
from ia3rt.ops._scale import bank_gradient


def _check_activation(gate: Tensor, up: Tensor | None, l: Tensor | None, kind: str) -> None:  # noqa: E741
    if kind not in reference.ACTIVATIONS:
        raise ValueError(f"kind must be one of {', '.join(reference.ACTIVATIONS)}, not {kind!r}")
    if gate.ndim == 0:
        raise ValueError("gate must have at least one dimension")
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise ValueError(f"up must be as gate is, {gate.dtype} {list(gate.shape)}, not {up.dtype} {list(up.shape)}")
    check_site("l", l, gate.shape[-1])


@custom_op("ia3rt::activation")
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
    check_routing(mixes, route)
    rows = flat(gate)
    check_rows(rows.shape[0], route)
    if gate.numel() == 0:
        return new(gate, gate.shape[-1])
    with device_of(gate):
        run = implementation("activation", gate)
        y = run(rows, None if up is None else flat(up), l, mixes, route, kind)
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
    check_routing(mixes, route)
    return new(gate, gate.shape[-1])


@custom_op("ia3rt::activation_gradient")
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
    _check_activation(gate, up, l, kind)
    check_routing(mixes, route)
    if dy.shape != gate.shape:
        raise ValueError(f"dy must be as gate is, {list(gate.shape)}, not {list(dy.shape)}")
    check_rows(gate.shape[:-1].numel(), route)
    if gate.numel() == 0:
        return [new(gate, gate.shape[-1]) for _ in range(1 if up is None else 2)]
    with device_of(gate):
        run = module("activation", gate).activation_gradient
        gradients = run(flat(dy), flat(gate), None if up is None else flat(up), l, mixes, route, kind)
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
    return [new(gate, gate.shape[-1]) for _ in range(1 if up is None else 2)]


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
