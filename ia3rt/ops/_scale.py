"""torch.ops.ia3rt.scale, and the gradient that every scale sends to the bank."""

from typing import Any

import torch
from torch import Tensor

from ia3rt import reference
from ia3rt.ops._checks import check_routing, check_rows, check_site
from ia3rt.ops._dispatch import device_of, flat, implementation, new, save_inputs
from ia3rt.ops._op import custom_op


def _check_scale(x: Tensor, l: Tensor) -> None:  # noqa: E741
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    check_site("l", l, x.shape[-1])


@custom_op("ia3rt::scale")
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
    check_routing(mixes, route)
    rows = flat(x)
    check_rows(rows.shape[0], route)
    if x.numel() == 0:
        return new(x, x.shape[-1])
    with device_of(x):
        y = implementation("scale", x)(rows, l, mixes, route)
    return y.view(x.shape)


@scale.register_fake
def _(x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    _check_scale(x, l)
    check_routing(mixes, route)
    return new(x, x.shape[-1])


def _scale_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, l, mixes, route = ctx.saved_tensors  # noqa: E741
    dx = scale(dy, l, mixes, route) if ctx.needs_input_grad[0] else None
    dl = bank_gradient(dy, x, l, mixes, route) if ctx.needs_input_grad[1] else None
    return dx, dl, None, None


scale.register_autograd(_scale_backward, setup_context=save_inputs)


@custom_op("ia3rt::bank_gradient")
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
