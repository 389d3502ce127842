"""torch.ops.ia3rt.rope and rope_into_cache."""

from typing import Any

import torch
from torch import Tensor

from ia3rt.ops._checks import check_routing, check_rows
from ia3rt.ops._dispatch import device_of, module
from ia3rt.ops._op import custom_op
from ia3rt.ops._scale import bank_gradient

_Parts = tuple[Tensor, Tensor, Tensor]
_Vectors = tuple[Tensor | None, Tensor | None, Tensor | None]


def _check_parts(parts: _Parts, vectors: _Vectors) -> None:
    q, k, v = parts
    if q.ndim < 3 or k.shape != v.shape or (*k.shape[:-2], k.shape[-1]) != (*q.shape[:-2], q.shape[-1]):
        raise ValueError(
            f"q, k and v must be [..., heads, D], with the same heads in k and v, not {list(q.shape)}, "
            f"{list(k.shape)} and {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    for name, l, x in zip(("l_q", "l_k", "l_v"), vectors, parts, strict=True):  # noqa: E741
        if l is not None and l.shape[1:] != x.shape[-2:]:
            raise ValueError(
                f"{name} must be a bank slice of shape [capacity, {x.shape[-2]}, {x.shape[-1]}], not {list(l.shape)}"
            )
        if l is not None and l.stride(2) != 1 and l.shape[2] > 1:
            raise ValueError(f"{name} must have contiguous numbers in a head; its strides are {list(l.stride())}")


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    D, rotary = q.shape[-1], cos.shape[-1] if cos.ndim else 0
    if cos.ndim < 2 or cos.shape != sin.shape or not 0 < rotary <= D or rotary % 2:
        raise ValueError(
            f"cos and sin must be [..., rotary_dim], with an even rotary_dim of at most {D}, not {list(cos.shape)} and "
            f"{list(sin.shape)}"
        )
    if cos.dtype != sin.dtype:
        raise ValueError(f"cos and sin must have one dtype, not {cos.dtype} and {sin.dtype}")


def _check_cache(k: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    heads, D = k.shape[-2:]
    if k_cache.ndim != 4 or list(k_cache.shape[2:]) != [heads, D] or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"k_cache and v_cache must be [blocks, block size, {heads}, {D}], not {list(k_cache.shape)} and "
            f"{list(v_cache.shape)}"
        )
    if not k_cache.dtype == v_cache.dtype == k.dtype:
        raise ValueError(f"the caches must be {k.dtype}, as k is, not {k_cache.dtype} and {v_cache.dtype}")
    if k_cache.stride() != v_cache.stride() or (k_cache.stride(3) != 1 and D > 1):
        raise ValueError(
            "k_cache and v_cache must have the same strides, and contiguous numbers in a head, not "
            f"{list(k_cache.stride())} and {list(v_cache.stride())}"
        )
    if slots.dtype not in (torch.int32, torch.int64) or slots.ndim != 1 or not slots.is_contiguous():
        raise ValueError(f"slots must be a contiguous int32 or int64 tensor [M], not {slots.dtype} {list(slots.shape)}")


def _heads(x: Tensor) -> Tensor:
    """Return x [..., heads, D] as [M, heads, D] with contiguous numbers: a view wherever one exists."""
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def _tables(cos: Tensor, sin: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin as contiguous [C, rotary_dim], without what only repeats both."""
    while cos.ndim > 2 and (cos.shape[0] == 1 or cos.stride(0) == sin.stride(0) == 0):
        cos, sin = cos[0], sin[0]
    cos, sin = (table.reshape(-1, table.shape[-1]).contiguous() for table in (cos, sin))
    if cos.shape[0] == 0 or rows % cos.shape[0]:
        raise ValueError(f"the {rows} rows of q are no multiple of the {cos.shape[0]} rows of cos and sin")
    return cos, sin


def _new(*xs: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in xs]


@custom_op("ia3rt::rope")
def rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_q: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    mixes: Tensor,
    route: Tensor,
    interleaved: bool,
) -> list[Tensor]:
    """Return [P (s_q ∘ q), P (s_k ∘ k), s_v ∘ v] in q.dtype, where P is the rotary embedding.

    Args:
        q: [..., heads, D], any strides.
        k: [..., heads of k and v, D] of q.dtype, any strides.
        v: as k.
        l_q: [capacity, heads, D], a bank slice, or a part of one, with contiguous numbers in a head; or None for no
            scale.
        l_k: as l_q, with the heads of k.
        l_v: as l_k.
        cos: [..., rotary_dim], rotary_dim even and at most D; its rows, C of them but for leading dimensions that
            repeat, divide those of q, and row m of q uses row m % C. There is an entry for each number, not for each
            pair. Numbers past rotary_dim are not rotated.
        sin: as cos. Neither gets a gradient.
        mixes: int32 [slots, 2 + 2K].
        route: int32 [R]; the number of rows of q is a multiple of R.
        interleaved: whether neighbours are a pair, as in GPT-J and Cohere; else the halves of rotary_dim are, as in
            Llama, Phi-3 and GPT-NeoX.

    The parts of one projection are read in place, side by side or by head. The results are contiguous.

    Raises:
        ValueError: a shape, dtype or layout is another.

    """
    _check_parts((q, k, v), (l_q, l_k, l_v))
    _check_tables(q, cos, sin)
    check_routing(mixes, route)
    parts = _heads(q), _heads(k), _heads(v)
    rows = parts[0].shape[0]
    check_rows(rows, route)
    if rows == 0:
        return _new(q, k, v)
    tables = _tables(cos, sin, rows)
    with device_of(q):
        ys = module("rope", q).rope(*parts, l_q, l_k, l_v, *tables, mixes, route, interleaved)
    return [y.view(x.shape) for y, x in zip(ys, (q, k, v), strict=True)]


@rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_q: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    mixes: Tensor,
    route: Tensor,
    interleaved: bool,
) -> list[Tensor]:
    _check_parts((q, k, v), (l_q, l_k, l_v))
    _check_tables(q, cos, sin)
    check_routing(mixes, route)
    return _new(q, k, v)


@custom_op("ia3rt::rope_gradient")
def rope_gradient(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    l_q: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    mixes: Tensor,
    route: Tensor,
    interleaved: bool,
) -> list[Tensor]:
    """Return [dL/dq, dL/dk], and dL/dv behind them where there is a dv, given the gradients of what rope returns."""
    _check_parts((dq, dk, dk if dv is None else dv), (l_q, l_k, l_v))
    _check_tables(dq, cos, sin)
    check_routing(mixes, route)
    dys = [dq, dk] if dv is None else [dq, dk, dv]
    rows = dq.shape[:-2].numel()
    check_rows(rows, route)
    if rows == 0:
        return _new(*dys)
    tables = _tables(cos, sin, rows)
    parts = (None if dy is None else _heads(dy) for dy in (dq, dk, dv))
    with device_of(dq):
        dxs = module("rope", dq).rope_gradient(*parts, l_q, l_k, l_v, *tables, mixes, route, interleaved)
    return [dx.view(dy.shape) for dx, dy in zip(dxs, dys, strict=True)]


@rope_gradient.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    l_q: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    mixes: Tensor,
    route: Tensor,
    interleaved: bool,
) -> list[Tensor]:
    return _new(dq, dk) if dv is None else _new(dq, dk, dv)


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.interleaved = inputs
    ctx.save_for_backward(*tensors)


def _rope_backward(ctx: Any, dys: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The vectors' gradients need Pᵀ dy as it is before the scale, and dy itself for v, which P leaves alone."""
    q, k, v, *vectors, cos, sin, mixes, route = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if needs[6] or needs[7]:
        raise ValueError("rope has no gradient for cos and sin: detach() them")
    fixed = cos, sin, mixes, route, ctx.interleaved
    dxs: list[Tensor | None] = [None] * 3
    dls: list[Tensor | None] = [None] * 3
    if any(needs[:3]):
        dxs = list(rope_gradient(*dys, *vectors, *fixed))
    if any(needs[3:6]):
        unscaled = (*rope_gradient(*dys[:2], None, None, None, None, *fixed), dys[2])
        for part, (dy, x, vector) in enumerate(zip(unscaled, (q, k, v), vectors, strict=True)):
            if needs[3 + part]:
                dl = bank_gradient(dy.flatten(-2), x.flatten(-2), vector.flatten(1), mixes, route)
                dls[part] = dl.view(vector.shape)
    return *dxs, *dls, *(None,) * 5


rope.register_autograd(_rope_backward, setup_context=_save_rope)


@custom_op("ia3rt::rope_into_cache", mutates_args=("k_cache", "v_cache"))
def rope_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_q: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    mixes: Tensor,
    route: Tensor,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Return what rope does of q, and write what it returns of k and v into their caches. Has no gradient.

    Args:
        q: as in `rope`, as are the others up to `interleaved`.
        k_cache: [blocks, block size, heads of k and v, D] of q.dtype, with contiguous numbers in a head. A static cache
            [batch, heads, length, D] is one with a block for each of the batch: pass cache.transpose(1, 2).
        v_cache: of the shape, dtype and strides of k_cache.
        slots: int32 or int64 [M]: row m goes to block slots[m] // block size, place slots[m] % block size, and nowhere
            where slots[m] is below 0. No two rows may go to one place.

    Raises:
        ValueError: a shape, dtype or layout is another.

    """
    _check_parts((q, k, v), (l_q, l_k, l_v))
    _check_tables(q, cos, sin)
    _check_cache(k, k_cache, v_cache, slots)
    check_routing(mixes, route)
    parts = _heads(q), _heads(k), _heads(v)
    rows = parts[0].shape[0]
    check_rows(rows, route)
    if slots.shape[0] != rows:
        raise ValueError(f"slots must have one entry for each of the {rows} rows, not {slots.shape[0]}")
    if rows == 0:
        return _new(q)[0]
    tables = _tables(cos, sin, rows)
    cache = k_cache, v_cache, slots
    with device_of(q):
        run = module("rope", q).rope_into_cache
        y: Tensor = run(*parts, l_q, l_k, l_v, *tables, mixes, route, interleaved, *cache)
    return y.view(q.shape)


@rope_into_cache.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_q: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    mixes: Tensor,
    route: Tensor,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    _check_parts((q, k, v), (l_q, l_k, l_v))
    _check_tables(q, cos, sin)
    _check_cache(k, k_cache, v_cache, slots)
    check_routing(mixes, route)
    return _new(q)[0]
