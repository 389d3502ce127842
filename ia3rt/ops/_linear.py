"""torch.ops.ia3rt.linear and linear_pair."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ia3rt.ops._checks import check_routing, check_rows, check_site
from ia3rt.ops._dispatch import device_of, flat, implementation, module, new, save_inputs, side_by_side
from ia3rt.ops._op import custom_op
from ia3rt.ops._scale import bank_gradient, scale


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, l_in: Tensor | None, l_out: Tensor | None) -> None:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} does not fit weight {list(weight.shape)}: [..., K_in] and [N, K_in] do")
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], not {list(bias.shape)}")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        dtypes = f"{x.dtype}, {weight.dtype}" + (f", {bias.dtype}" if bias is not None else "")
        raise ValueError(f"x, weight and bias must have one dtype, not {dtypes}")
    check_site("l_in", l_in, weight.shape[1])
    check_site("l_out", l_out, weight.shape[0])


@custom_op("ia3rt::linear")
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
        bias: [N], any stride, or None.
        l_in: [capacity, K_in], a bank slice with contiguous columns, or None for no scale on x.
        l_out: [capacity, N], the same for the output.
        mixes: int32 [slots, 2 + 2K].
        route: int32 [R]; the number of rows of x is a multiple of R.

    x, weight and bias have one dtype; a bank slice may have another. The result is contiguous.

    Raises:
        ValueError: a shape, dtype or layout is another.

    """
    check_linear(x, weight, bias, l_in, l_out)
    check_routing(mixes, route)
    rows = flat(x)
    check_rows(rows.shape[0], route)
    if 0 in (rows.shape[0], weight.shape[0]):
        return new(x, weight.shape[0])
    with device_of(x):
        y = implementation("linear", x)(rows, weight, side_by_side(bias), l_in, l_out, mixes, route)
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
    check_linear(x, weight, bias, l_in, l_out)
    check_routing(mixes, route)
    return new(x, weight.shape[0])


def linear_gradients(
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
    return *linear_gradients(dy, ctx.saved_tensors, ctx.needs_input_grad[:5]), None, None


linear.register_autograd(_linear_backward, setup_context=save_inputs)


@custom_op("ia3rt::linear_pair")
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
        bias_a: [N_a], any stride, or None.
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
    check_linear(x, weight_a, bias_a, None, l_a)
    check_linear(x, weight_b, bias_b, None, l_b)
    check_routing(mixes, route)
    rows = flat(x)
    check_rows(rows.shape[0], route)
    if 0 in (rows.shape[0], weight_a.shape[0], weight_b.shape[0]):  # of one of them there is nothing to launch
        y_a = linear.body(x, weight_a, bias_a, None, l_a, mixes, route)
        return y_a, linear.body(x, weight_b, bias_b, None, l_b, mixes, route)
    with device_of(x):
        run = module("linear_pair", x).linear_pair
        a, b = (weight_a, side_by_side(bias_a), l_a), (weight_b, side_by_side(bias_b), l_b)
        y_a, y_b = run(rows, a, b, mixes, route)
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
    check_linear(x, weight_a, bias_a, None, l_a)
    check_linear(x, weight_b, bias_b, None, l_b)
    check_routing(mixes, route)
    return new(x, weight_a.shape[0]), new(x, weight_b.shape[0])


def _linear_pair_backward(ctx: Any, dy_a: Tensor, dy_b: Tensor) -> tuple[Tensor | None, ...]:
    """Add what the two layers send back to x; the rest is each layer's own."""
    x, *layers, mixes, route = ctx.saved_tensors
    need_x, *needs = ctx.needs_input_grad[:7]
    gradients = []
    for dy, first in ((dy_a, 0), (dy_b, 3)):
        (weight, bias, l_out), (of_weight, of_bias, of_l) = layers[first : first + 3], needs[first : first + 3]
        inputs = (x, weight, bias, None, l_out, mixes, route)
        gradients.append(linear_gradients(dy, inputs, (need_x, of_weight, of_bias, False, of_l)))
    (dx_a, dweight_a, dbias_a, _, dl_a), (dx_b, dweight_b, dbias_b, _, dl_b) = gradients
    dx = None if dx_a is None or dx_b is None else dx_a + dx_b
    return dx, dweight_a, dbias_a, dl_a, dweight_b, dbias_b, dl_b, None, None


linear_pair.register_autograd(_linear_pair_backward, setup_context=save_inputs)
