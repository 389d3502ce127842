"""The rotary embedding of an attention's parts, scaled, and its gradient; into a cache, too."""

import torch
from torch import Tensor

from ia3rt.reference._scale import scale


def _turned(x: Tensor, interleaved: bool) -> Tensor:
    """Return x a quarter turn on: of each pair, (−x_b, x_a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool = False) -> Tensor:
    """Return P x, or Pᵀ x, for x [M, heads, D] and cos and sin [C, rotary_dim], in x.dtype.

    P is x ∘ cos + T x ∘ sin, where T is the quarter turn, and Tᵀ is −T.
    """
    turned, rest = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
    cos, sin = (table.repeat(x.shape[0] // table.shape[0], 1)[:, None, :] for table in (cos, sin))
    if transposed:
        turned = turned * cos - _turned(turned * sin, interleaved)
    else:
        turned = turned * cos + _turned(turned, interleaved) * sin
    return torch.cat((turned.to(x.dtype), rest), -1)


def _scale_heads(x: Tensor, l: Tensor | None, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    return x if l is None else scale(x.flatten(1), l.flatten(1), mixes, route).view(x.shape)


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
    """Return [P (s_q ∘ q), P (s_k ∘ k), s_v ∘ v] for q, k and v [M, heads, D] and l [capacity, heads, D].

    Row m turns by row m % C of cos and sin [C, rotary_dim]. Rounds where transformers and PEFT round: the scaled
    projection, the products with cos and sin, and their sum. The kernel rounds once.
    """
    q = _rotate(_scale_heads(q, l_q, mixes, route), cos, sin, interleaved)
    k = _rotate(_scale_heads(k, l_k, mixes, route), cos, sin, interleaved)
    return [q, k, _scale_heads(v, l_v, mixes, route).clone()]


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
    """Return [s_q ∘ Pᵀ dq, s_k ∘ Pᵀ dk], and s_v ∘ dv behind them where there is a dv; see rope."""
    dq = _scale_heads(_rotate(dq, cos, sin, interleaved, transposed=True), l_q, mixes, route)
    dk = _scale_heads(_rotate(dk, cos, sin, interleaved, transposed=True), l_k, mixes, route)
    return [dq, dk] if dv is None else [dq, dk, _scale_heads(dv, l_v, mixes, route).clone()]


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
    """Return what rope does of q; write its k and v into caches [blocks, block size, heads, D], row m at slots[m].

    A slot is block · block size + place in the block; a row whose slot is below 0 is not written.
    """
    q, *kept = rope(q, k, v, l_q, l_k, l_v, cos, sin, mixes, route, interleaved)
    rows = (slots >= 0).nonzero().squeeze(1)
    places = slots[rows].long()
    for x, cache in zip(kept, (k_cache, v_cache), strict=True):
        cache[places // cache.shape[1], places % cache.shape[1]] = x[rows]
    return q
