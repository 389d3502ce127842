"""A mix, composed; an activation scaled by it; and what its gradient sends back to the bank."""

from typing import NamedTuple

import torch
from torch import Tensor


class MixTable(NamedTuple):
    """A mix table taken apart, one row a mix: views of the table, but for the two masks."""

    product: Tensor
    """bool [slots, 1]: whether the mix is a product; else it is a weighted sum."""
    live: Tensor
    """bool [slots, K]: whether this place of the mix holds an adapter."""
    ids: Tensor
    """int32 [slots, K]: rows of the bank."""
    weights: Tensor
    """fp32 [slots, K]."""


def split_mixes(mixes: Tensor) -> MixTable:
    """Take a mix table apart."""
    size = (mixes.shape[1] - 2) // 2
    places = torch.arange(size, device=mixes.device)
    ids, weights = mixes[:, 2 : 2 + size], mixes[:, 2 + size : 2 + 2 * size]
    return MixTable(mixes[:, :1] == 0, places < mixes[:, 1:2], ids, weights.view(torch.float32))


def compose(bank: Tensor, mixes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return [slots, width], what each mix is at these columns of the bank: Π_j l_j, or Σ_j w_j l_j.

    Computed and returned in `dtype`; where None, in fp32, or in fp64 for a bank in fp64.
    """
    dtype = dtype or torch.promote_types(bank.dtype, torch.float32)
    product, live, ids, weights = split_mixes(mixes)
    s = product.to(dtype).expand(-1, bank.shape[1])
    for j in range(ids.shape[1]):
        l_j = bank[ids[:, j]].to(dtype)
        folded = torch.where(product, s * l_j, s + weights[:, j, None].to(dtype) * l_j)
        s = torch.where(live[:, j, None], folded, s)
    return s


def _scale_dtype(x: Tensor, l: Tensor) -> torch.dtype:  # noqa: E741
    return torch.promote_types(torch.promote_types(x.dtype, l.dtype), torch.float32)


def _by_route(x: Tensor, route: Tensor) -> Tensor:
    """Return x as [R, M // R, width], the rows of each entry of route together."""
    return x.reshape(route.shape[0], x.shape[:-1].numel() // route.shape[0], x.shape[-1])


def scale(x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    """Return s ∘ x for x [..., width] and l [capacity, width]: computed in fp32 (fp64) and rounded once to x.dtype."""
    s = compose(l, mixes[route], _scale_dtype(x, l))
    return (_by_route(x, route) * s[:, None, :]).to(x.dtype).reshape(x.shape)


def bank_gradient(dy: Tensor, x: Tensor, l: Tensor, mixes: Tensor, route: Tensor) -> Tensor:  # noqa: E741
    """Return dL/dl as [capacity, width], given dL/dy for y = s ∘ x, both [..., width].

        dL/ds   = Σ_rows dy ∘ x
        ds/dl_j = Π_{i≠j} l_i   of a product,   w_j   of a linear mix

    The product without l_j comes from the products before and after it, never from a division, so a factor of zero is
    right. Sums over rows and over mixes have a fixed order: the same inputs give the same bits.
    """
    dtype = _scale_dtype(x, l)
    ds = _by_route(dy.to(dtype) * x.to(dtype), route).sum(1)
    if route.shape[0] > mixes.shape[0]:  # one entry a token: first add up what wears the same mix
        ds = _add_rows(ds, route, mixes.shape[0])
    else:
        mixes = mixes[route]
    product, live, ids, weights = split_mixes(mixes)
    factors = [torch.where(live[:, j, None], l[ids[:, j]].to(dtype), 1.0) for j in range(ids.shape[1])]
    before = [torch.ones_like(ds)]
    for factor in factors:
        before.append(before[-1] * factor)
    after = torch.ones_like(ds)
    dl = torch.zeros(l.shape, dtype=dtype, device=l.device)
    for j in reversed(range(len(factors))):
        partial = torch.where(product, before[j] * after, weights[:, j, None].to(dtype))
        dl += _add_rows(torch.where(live[:, j, None], ds * partial, 0.0), ids[:, j], l.shape[0])
        after = after * factors[j]
    return dl.to(l.dtype)


def _add_rows(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """Return [rows, width], where row i is the sum of the values whose index is i, in their order.

    It is what an embedding's gradient is, which unlike index_add is deterministic on every device.
    """
    added: Tensor = torch.ops.aten.embedding_dense_backward(values, index.contiguous(), rows, -1, False)
    return added
