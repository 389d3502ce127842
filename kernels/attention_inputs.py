"""What the attention kernels read: how q, k, v and a mask lie in memory, in pages too."""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-2.0e38)  # which fp32 holds in base 2, too


class Strides(NamedTuple):
    """Those of q, k or v, whose last one is 1: [B, heads, S, D], or [pages, heads, page, D]."""

    b: int
    head: int
    row: int


class MaskStrides(NamedTuple):
    """Those of a mask, [B, Hq, Sq, Skv]."""

    b: int
    head: int
    row: int
    key: int


class Inputs(NamedTuple):
    """What a launch attends to."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    """Added to the scores; or int8, which scores there are."""
    ranges: Tensor | None
    """int32 [B, 2]."""
    table: Tensor | None
    """int32 [B, max pages]."""
    q_strides: Strides
    k_strides: Strides
    v_strides: Strides
    mask_strides: MaskStrides | None
    page: int | None
    """The keys of a page, where there is a table."""
    scale: float
    softcap: float | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        ranges: Tensor | None,
        table: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> "Inputs":
        """Lay out what attention is given."""
        of_q, of_k, of_v = (Strides(*x.stride()[:3]) for x in (q, k, v))
        mask_strides = None if mask is None else MaskStrides(*mask.stride())
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.int8)
        page = None if table is None else k.shape[2]
        return cls(q, k, v, mask, ranges, table, of_q, of_k, of_v, mask_strides, page, scale, softcap)


@triton.jit
def rows_of(b, heads, rows, strides):
    """Return the 64-bit offsets of rows."""
    return b.to(tl.int64) * strides.b + heads.to(tl.int64) * strides.head + rows.to(tl.int64) * strides.row


@triton.jit
def key_rows(b, head, keys, inside, inputs, stride_table, strides):
    """Return the 64-bit offsets of keys [N] in k or v: of sequence b, or of the pages that its row of the table has."""
    where, places = b.to(tl.int64), keys
    if inputs.table is not None:
        pages = inputs.table + b * stride_table + keys // inputs.page
        where = tl.load(pages, mask=inside, other=0).to(tl.int64)
        places = keys % inputs.page
    return rows_of(where, head, places, strides)


@triton.jit
def masked(s, inputs, mask_rows, keys, inside):
    """Add an additive mask to scores in base 2, or take out what a boolean one takes out.

    The least number of a dtype is no −inf, which it would be in base 2: a row of it is the mean of all keys.
    """
    mask_ptrs = inputs.mask + mask_rows + keys.to(tl.int64) * inputs.mask_strides.key
    if inputs.mask.dtype.element_ty == tl.int8:
        s = tl.where(tl.load(mask_ptrs, mask=inside, other=0) != 0, s, float("-inf"))
    else:
        added = tl.load(mask_ptrs, mask=inside, other=0.0).to(tl.float32)
        s += tl.where((added < LEAST) & (added > float("-inf")), LEAST, added) * LOG2_E
    return s
