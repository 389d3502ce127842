"""torch.ops.ia3rt.linear_quantised."""

from typing import Any

import torch
from torch import Tensor

from ia3rt import reference
from ia3rt.ops._checks import check_routing, check_rows, check_site
from ia3rt.ops._dispatch import device_of, flat, implementation, new, side_by_side
from ia3rt.ops._linear import linear_gradients
from ia3rt.ops._op import custom_op

KINDS = ("int8", "fp8", "int4", "gptq", "gptq_v2")
_STORED = {"int8": (torch.int8,), "fp8": (torch.float8_e4m3fn,), "int4": (torch.int8, torch.uint8)}


def _check(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    kind: str,
    group_size: int,
) -> None:
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r} of quantised weight; there are {', '.join(KINDS)}")
    if x.ndim == 0 or weight.ndim != 2 or scales.ndim == 0:
        raise ValueError(f"x {list(x.shape)}, weight {list(weight.shape)} and scales {list(scales.shape)} do not fit")
    N, K = scales.shape[-1], x.shape[-1]
    grouped = kind not in ("int8", "fp8")
    gptq = kind.startswith("gptq")
    shape = [K // 8, N] if gptq else [N, K // 2] if grouped else [N, K]
    if grouped and (group_size <= 0 or K % (8 if gptq else 2) or (gptq and N % 8)):
        raise ValueError(f"a weight [{N}, {K}] in groups of {group_size} is not one that {kind} packs")
    if list(weight.shape) != shape or weight.dtype not in _STORED.get(kind, (torch.int32,)) or weight.stride(1) != 1:
        raise ValueError(
            f"weight must be {shape} with contiguous columns, not {weight.dtype} {list(weight.shape)}: x has {K} "
            f"columns, scales {N}, and the kind is {kind}"
        )
    # With g_idx there may be any number of groups.
    count = -(-K // group_size) if grouped and groups is None else scales.shape[0]
    if list(scales.shape) != ([count, N] if grouped else [N]) or not scales.is_contiguous():
        raise ValueError(f"scales must be contiguous, {[count, N] if grouped else [N]}, not {list(scales.shape)}")
    zeros_shape = [count, N // 8 if gptq else N] if grouped else None
    if (None if zeros is None else list(zeros.shape)) != zeros_shape:
        raise ValueError(f"zeros must be {zeros_shape}, not {None if zeros is None else list(zeros.shape)}")
    if zeros is not None and (not zeros.is_contiguous() or (zeros.dtype != torch.int32 and gptq)):
        raise ValueError(f"zeros must be contiguous, and int32 for GPTQ; they are {zeros.dtype}")
    if groups is not None and (not gptq or list(groups.shape) != [K] or groups.dtype != torch.int32):
        raise ValueError(f"groups must be int32 [{K}], and only GPTQ has them; they are {list(groups.shape)}")
    if bias is not None and (list(bias.shape) != [N] or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous, [{N}], not {list(bias.shape)}")
    check_site("l_in", l_in, K)
    check_site("l_out", l_out, N)


@custom_op("ia3rt::linear_quantised")
def linear_quantised(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
    kind: str,
    group_size: int,
) -> Tensor:
    """Return s_out ∘ (W_q (s_in ∘ x) + b) in x.dtype, for a weight that stays quantised.

    Args:
        x: [..., K], any strides.
        weight: the stored values: int8 or e4m3fn [N, K]; int8 or uint8 [N, K / 2] (int4); int32 [K / 8, N] (GPTQ).
        scales: [N], or [groups, N] for int4 and GPTQ; contiguous.
        zeros: None; for int4 [groups, N], for GPTQ int32 [groups, N / 8]; contiguous.
        groups: GPTQ's g_idx, int32 [K], in any order and of any stride; None for groups of neighbours.
        bias: [N], contiguous, or None.
        l_in: [capacity, K], a bank slice with contiguous columns, or None for no scale on x.
        l_out: [capacity, N], the same for the output.
        mixes: int32 [slots, 2 + 2K].
        route: int32 [R]; the number of rows of x is a multiple of R.
        kind: one of KINDS; the formats are in kernels/linear_quantised.py.
        group_size: how many neighbours along K share a scale; 0 where it belongs to a channel.

    The weight is frozen: x, bias, l_in and l_out have gradients. The result is contiguous.

    Raises:
        ValueError: a shape, dtype or layout is another.

    """
    _check(x, weight, scales, zeros, groups, bias, l_in, l_out, kind, group_size)
    check_routing(mixes, route)
    rows = flat(x)
    check_rows(rows.shape[0], route)
    N = scales.shape[-1]
    if 0 in (rows.shape[0], N):
        return new(x, N)
    with device_of(x):
        run = implementation("linear_quantised", x)
        y = run(rows, weight, scales, zeros, side_by_side(groups), bias, l_in, l_out, mixes, route, kind, group_size)
    return y.view(*x.shape[:-1], N)


@linear_quantised.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
    kind: str,
    group_size: int,
) -> Tensor:
    _check(x, weight, scales, zeros, groups, bias, l_in, l_out, kind, group_size)
    check_routing(mixes, route)
    return new(x, scales.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind, ctx.group_size = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients are those of a dense layer. Its weight is dequantised for them once more: they have to multiply."""
    x, weight, scales, zeros, groups, bias, l_in, l_out, mixes, route = ctx.saved_tensors
    dense = reference.dequantise(weight, scales, zeros, groups, ctx.kind, ctx.group_size, x.dtype)
    needs = ctx.needs_input_grad
    like_x = None if bias is None else bias.to(x.dtype)
    inputs = x, dense, like_x, l_in, l_out, mixes, route
    dx, _, dbias, dl_in, dl_out = linear_gradients(dy, inputs, (needs[0], False, *needs[5:8]))
    dbias = dbias if dbias is None or bias is None else dbias.to(bias.dtype)
    return dx, None, None, None, None, dbias, dl_in, dl_out, None, None, None, None


linear_quantised.register_autograd(_backward, setup_context=_setup_context)
