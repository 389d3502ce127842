"""torch.ops.ia3rt.attention."""

from typing import Any

import torch
from torch import Tensor

from ia3rt.ops._checks import check_routing, check_rows, check_site
from ia3rt.ops._dispatch import device_of, module
from ia3rt.ops._op import custom_op
from ia3rt.ops._scale import bank_gradient, scale


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    table: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must be [batch, heads, length, D]"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    B, Hq, Sq, D = q.shape
    heads, length = (k.shape[1], k.shape[2]) if table is None else (k.shape[2], table.shape[-1] * k.shape[1])
    if heads == 0 or Hq % heads:
        raise ValueError(f"the {Hq} heads of q cannot be divided among {heads} heads of k")
    if D > 256:
        raise ValueError(f"a head has at most 256 numbers, not {D}")
    if table is None and k.shape[0] != B:
        raise ValueError(f"q has {B} sequences and k {k.shape[0]}")
    if table is not None and (table.dtype != torch.int32 or table.ndim != 2 or table.shape[0] != B):
        raise ValueError(f"table must be int32 [{B}, pages], not {table.dtype} {list(table.shape)}")
    if table is not None and ranges is None:
        raise ValueError("a table needs ranges: how many keys each sequence has")
    if ranges is not None and (ranges.dtype != torch.int32 or list(ranges.shape) != [B, 2]):
        raise ValueError(f"ranges must be int32 [{B}, 2], not {ranges.dtype} {list(ranges.shape)}")
    if mask is not None and (
        mask.ndim != 4 or any(m not in (1, n) for m, n in zip(mask.shape, (B, Hq, Sq, length), strict=True))
    ):
        raise ValueError(f"mask must broadcast to {[B, Hq, Sq, length]}, which {list(mask.shape)} does not")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask must be boolean, or numbers to add to the scores; not {mask.dtype}")
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"window and softcap must be positive, or None; not {window} and {softcap}")
    check_site("l_k", l_k, heads * D)
    check_site("l_v", l_v, heads * D)


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@custom_op("ia3rt::attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    table: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    mixes: Tensor,
    route: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """Return [s_v ∘ softmax(mask(softcap(scale · (s_k ∘ q) kᵀ))) v, its logsumexp in base 2].

    Args:
        q: [B, Hq, Sq, D], D ≤ 256; any strides, as k and v.
        k: [B, Hkv, Skv, D] of q.dtype, Hq a multiple of Hkv; or, with a table, [pages, page size, Hkv, D].
        v: as k.
        mask: boolean, True where a query sees a key, or numbers that are added to the scores; broadcasts to
            [B, Hq, Sq, Skv]. It gets no gradient.
        ranges: int32 [B, 2], which keys each sequence has: from one to before the other. For padding on either side.
        table: int32 [B, max pages], the pages of each sequence in their order; `ranges` then says how many keys it has.
        l_k: [capacity, Hkv * D], a bank slice with contiguous columns, or None for no scale of k. Only right where no
            rotary embedding comes between the projection of k and this.
        l_v: the same for v.
        mixes: int32 [slots, 2 + 2K].
        route: int32 [R]; sequence b wears mix route[b // (B // R)].
        scale: what q·k is multiplied by.
        causal: whether query i sees only keys up to i + n − Sq, where n is Skv; with a table, the sequence's length.
        window: how many keys back a query sees, itself included; not causal, as many ahead too. None for all.
        softcap: scores become softcap · tanh(score / softcap); None for no cap.

    l_k and l_v are for keys and values that are not kept for one mix: all that a sequence sees is scaled by the mix
    that it wears now. A cache holds what each token's own mix made of it; there, scale the projections.

    The first result is [B, Sq, Hq, D], contiguous, in q.dtype; the second fp32 (fp64) [B, Hq, Sq], without a gradient.
    A query that sees no key gets 0, and +inf as its logsumexp.

    Raises:
        ValueError: a shape, dtype or layout is another.

    """
    _check_attention(q, k, v, mask, ranges, table, l_k, l_v, window, softcap)
    check_routing(mixes, route)
    check_rows(q.shape[0], route)
    q, k, v = _packed(q), _packed(k), _packed(v)
    if table is not None:
        k, v, table = k.transpose(1, 2), v.transpose(1, 2), table.contiguous()
    Skv = k.shape[2] if table is None else table.shape[1] * k.shape[2]
    if mask is not None:
        mask = mask.expand(*q.shape[:3], Skv)
    if ranges is not None:
        ranges = ranges.contiguous()
    with device_of(q):
        run = module("attention", q).attention
        return list(run(q, k, v, mask, ranges, table, l_k, l_v, mixes, route, scale, causal, window, softcap))


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    table: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    mixes: Tensor,
    route: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    _check_attention(q, k, v, mask, ranges, table, l_k, l_v, window, softcap)
    check_routing(mixes, route)
    B, Hq, Sq, D = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return [q.new_empty((B, Sq, Hq, D)), q.new_empty((B, Hq, Sq), dtype=dtype)]


@custom_op("ia3rt::attention_gradient")
def attention_gradient(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """Return [dq, dk, dv], contiguous, given do for o, lse = attention(q, k, v, …) without vectors and without a table.

    Raises:
        ValueError: a shape or dtype is another.

    """
    _check_attention(q, k, v, mask, ranges, None, None, None, window, softcap)
    B, Hq, Sq, D = q.shape
    for name, x, shape in (("do", do, (B, Sq, Hq, D)), ("o", o, (B, Sq, Hq, D)), ("lse", lse, (B, Hq, Sq))):
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(x.shape)}")
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    if ranges is not None:
        ranges = ranges.contiguous()
    q, k, v = _packed(q), _packed(k), _packed(v)
    if 0 in (q.numel(), k.numel()):
        return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    with device_of(q):
        run = module("attention_gradient", q).attention_gradient
        laid_out = do.contiguous(), q, k, v, o.contiguous(), lse.contiguous()
        gradients = run(*laid_out, mask, ranges, scale, causal, window, softcap)
    return [gradient.contiguous() for gradient in gradients]


@attention_gradient.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _for_query_heads(l: Tensor, heads: int, D: int) -> Tensor:  # noqa: E741
    """Return l [capacity, Hkv * D] as [capacity, heads * D]: each KV head's part for each of its query heads."""
    grouped = l.reshape(l.shape[0], -1, 1, D)
    return grouped.expand(-1, -1, heads // grouped.shape[1], -1).flatten(1)


def _bank_gradient(dy: Tensor, x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    """Return dl for y = s ∘ x, both [B, Sq, Hq, D]: the sum over the query heads of each KV head."""
    heads, D = x.shape[2:]
    wide = _for_query_heads(l, heads, D)
    dl: Tensor = bank_gradient(dy.flatten(2), x.flatten(2), wide, mixes, route)
    return dl.view(l.shape[0], l.shape[1] // D, -1, D).sum(2).flatten(1)


def _scaled(x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    """Return s ∘ x for x [B, Sq, Hq, D] and l [capacity, Hkv * D]."""
    y: Tensor = scale(x.flatten(2), _for_query_heads(l, *x.shape[2:]), mixes, route)
    return y.view(x.shape)


def _attention_backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What l_v multiplied is computed again for its gradient, as in _linear_backward."""
    q, k, v, mask, ranges, table, l_k, l_v, mixes, route, o, lse = ctx.saved_tensors
    do = gradients[0]
    if table is not None or ctx.needs_input_grad[3]:
        raise ValueError("attention has no gradient for a mask, nor through a table of pages")
    options = ctx.scale, ctx.causal, ctx.window, ctx.softcap
    if do is None:
        return (None,) * 14
    dl_k = dl_v = None
    if l_v is not None:
        o, _ = attention(q, k, v, mask, ranges, None, l_k, None, mixes, route, *options)
        if ctx.needs_input_grad[7]:
            dl_v = _bank_gradient(do, o, l_v, mixes, route)
        do = _scaled(do, l_v, mixes, route)
    worn = q if l_k is None else _scaled(q.transpose(1, 2), l_k, mixes, route).transpose(1, 2)
    dq, dk, dv = attention_gradient(do, worn, k, v, o, lse, mask, ranges, *options)
    if l_k is not None:
        if ctx.needs_input_grad[6]:
            dl_k = _bank_gradient(dq.transpose(1, 2), q.transpose(1, 2), l_k, mixes, route)
        dq = _scaled(dq.transpose(1, 2), l_k, mixes, route).transpose(1, 2)
    return dq, dk, dv, None, None, None, dl_k, dl_v, *(None,) * 6


attention.register_autograd(_attention_backward, setup_context=_save_attention)
