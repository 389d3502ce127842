"""Attention, scaled, and its gradient."""

import math

import torch
from torch import Tensor

from ia3rt.reference._scale import scale as scaled


def _by_head(x: Tensor, l: Tensor | None, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    """Return x [B, Hq, Sq, D], scaled by l [capacity, Hkv * D], of which each KV head's part serves its query heads."""
    if l is None:
        return x
    B, Hq, Sq, D = x.shape
    grouped = x.view(B, -1, Hq * D // l.shape[1], Sq, D).permute(0, 2, 3, 1, 4).reshape(B, -1, l.shape[1])
    y = scaled(grouped, l, mixes, route).view(B, Hq * D // l.shape[1], Sq, -1, D)
    return y.permute(0, 3, 1, 2, 4).reshape(x.shape)


def _gathered(x: Tensor, table: Tensor | None) -> Tensor:
    """Return [B, Hkv, Skv, D]: x itself, or what the pages [pages, Hkv, page, D] of each sequence hold."""
    return x if table is None else x[table.long()].transpose(1, 2).flatten(2, 3)


def _within(x: Tensor, ranges: Tensor | None) -> Tensor:
    """Return keys or values [B, Hkv, Skv, D] with 0 for what a range leaves out: it may be NaN, and 0 times it too."""
    if ranges is None:
        return x
    keys = torch.arange(x.shape[2], device=x.device)
    outside = (keys < ranges[:, :1]) | (keys >= ranges[:, 1:])
    return x.masked_fill(outside[:, None, :, None], 0)


def _scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    paged: bool,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the masked scores [B, Hq, Sq, Skv] in fp32 or fp64, and the capped ones before the mask."""
    Sq, Skv = q.shape[2], k.shape[2]
    s = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    capped = None
    if softcap is not None:
        s = capped = softcap * torch.tanh(s / softcap)
    keys = torch.arange(Skv, device=q.device)
    places = torch.arange(Sq, device=q.device)[:, None] + Skv - Sq
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    if ranges is not None:
        start, end = ranges[:, :1, None, None], ranges[:, 1:, None, None]
        seen = (keys >= start) & (keys < end)
        if paged:
            places = places - Skv + end
    if causal:
        seen = seen & (keys <= places)
    if window is not None:
        seen = seen & (keys > places - window) & (keys < places + window)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    return s.masked_fill(~seen | (s == -math.inf), -math.inf), capped  # which stops the gradient of what is −inf


def _softmax(s: Tensor) -> Tensor:
    """Return the softmax of scores, 0 where a row has none. By their logsumexp, large ones would lose their sum."""
    empty = (s == -math.inf).all(-1, keepdim=True)
    return s.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


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
) -> tuple[Tensor, Tensor]:
    """Return o [B, Sq, Hq, D] and its logsumexp in base 2 [B, Hq, Sq]; the arguments are the kernel's.

    Rounds where transformers' eager attention rounds: q kᵀ, the softmax, and its product with v.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (_within(_gathered(x, table), ranges).repeat_interleave(groups, 1) for x in (k, v))
    q = _by_head(q, l_k, mixes, route)
    s, _ = _scores(q, k, mask, ranges, table is not None, scale, causal, window, softcap)
    lse = torch.logsumexp(s, -1)
    lse = torch.where(lse == -math.inf, math.inf, lse / math.log(2)).clamp(min=torch.finfo(lse.dtype).min)
    o = _softmax(s).to(q.dtype) @ v
    return _by_head(o, l_v, mixes, route).transpose(1, 2).contiguous(), lse


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
    """Return [dq, dk, dv], shaped as q, k and v, given dL/do for o, lse = attention(q, k, v, …) without vectors.

        P = softmax(s)    dv = Pᵀ do    ds = P ∘ (do vᵀ − rowsum(do ∘ o))    dq = scale · ds k    dk = scale · dsᵀ q

    and ds is multiplied by 1 − (s / softcap)² where the scores are capped. Of do and o, only do ∘ o is seen together:
    for o = s_v ∘ attention(…), pass s_v ∘ do and that attention's own result. The kernel's P is 2^(s − lse).
    """
    groups = q.shape[1] // k.shape[1]
    do, o = do.transpose(1, 2), o.transpose(1, 2)
    heads_k, heads_v = (_within(x, ranges).repeat_interleave(groups, 1) for x in (k, v))
    s, capped = _scores(q, heads_k, mask, ranges, False, scale, causal, window, softcap)
    p = _softmax(s)
    delta = (do.to(s.dtype) * o.to(s.dtype)).sum(-1, keepdim=True)
    ds = p * ((do @ heads_v.transpose(2, 3)).to(s.dtype) - delta)
    if softcap is not None and capped is not None:
        ds = ds * (1 - (capped / softcap).square())
    ds = ds.to(q.dtype)
    dk, dv = ds.transpose(2, 3) @ q * scale, p.to(q.dtype).transpose(2, 3) @ do
    dk, dv = (x.view(x.shape[0], -1, groups, *x.shape[2:]).sum(2) for x in (dk, dv))
    return [ds @ heads_k * scale, dk, dv]
