"""What the rope kernel is made of: a launch's parts, and how some heads of one are scaled and rotated (rope.py)."""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.mixes import Site, mixed_scale


class HeadSite(NamedTuple):
    """A Site whose columns are heads, which may be apart."""

    l: Tensor | None  # noqa: E741
    """[capacity, heads, D], any row and head stride, numbers contiguous; None where there is no vector."""
    stride: int
    stride_head: int

    @classmethod
    def of(cls, l: Tensor | None) -> "HeadSite":  # noqa: E741
        """Lay out a slice."""
        return cls(None, 0, 0) if l is None else cls(l, *l.stride()[:2])


class Part(NamedTuple):
    """One of q, k and v in a launch."""

    site: HeadSite
    x: Tensor
    """[M, heads, D], any row and head stride, numbers contiguous."""
    y: Tensor
    """[M, heads, D], contiguous; or a cache."""
    stride_x: int
    stride_x_head: int


class Cache(NamedTuple):
    """Where the rows of k and v go in their caches, each [blocks, block size, heads, D], numbers contiguous."""

    slots: Tensor
    """Integers [M]: block · block size + place in the block; below 0 for a row that is not kept."""
    block_size: int
    stride_block: int
    stride_slot: int
    stride_head: int


@triton.jit
def _load_pairs(rows, live, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the first and the second numbers of the pairs as fp32 [len(rows), BLOCK]; `rows` points at rows."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK)
        x = tl.load(rows[:, None] + cols[None, :], mask=live[:, None] & (cols < 2 * HALF)[None, :]).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [x.shape[0], BLOCK, 2]))
    else:
        cols = tl.arange(0, BLOCK)
        inside = live[:, None] & (cols < HALF)[None, :]
        first = tl.load(rows[:, None] + cols[None, :], mask=inside).to(tl.float32)
        second = tl.load(rows[:, None] + HALF + cols[None, :], mask=inside).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(rows, first, second, live, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Round and store what `_load_pairs` would load."""
    dtype = rows.dtype.element_ty
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK)
        y = tl.reshape(tl.join(first, second), [first.shape[0], 2 * BLOCK]).to(dtype)
        tl.store(rows[:, None] + cols[None, :], y, mask=live[:, None] & (cols < 2 * HALF)[None, :])
    else:
        cols = tl.arange(0, BLOCK)
        inside = live[:, None] & (cols < HALF)[None, :]
        tl.store(rows[:, None] + cols[None, :], first.to(dtype), mask=inside)
        tl.store(rows[:, None] + HALF + cols[None, :], second.to(dtype), mask=inside)


@triton.jit
def _scale_pairs(site, worn, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return s of the first and of the second numbers of the pairs."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK)
        s = mixed_scale(site, worn, cols, 2 * HALF)
        first, second = tl.split(tl.reshape(s, [s.shape[0], BLOCK, 2]))
    else:
        cols = tl.arange(0, BLOCK)
        first = mixed_scale(site, worn, cols, HALF)
        second = mixed_scale(Site(site.l + HALF, site.stride), worn, cols, HALF)
    return first, second


@triton.jit
def _scale_rest(x_rows, y_rows, read, written, site, worn, START: tl.constexpr, D: tl.constexpr):
    """Scale one head's numbers from START on."""
    cols = tl.arange(0, triton.next_power_of_2(D - START))
    within = (cols < D - START)[None, :]
    y = tl.load(x_rows[:, None] + START + cols[None, :], mask=read[:, None] & within).to(tl.float32)
    if site.l is not None:
        y *= mixed_scale(Site(site.l + START, site.stride), worn, cols, D - START)
    tl.store(y_rows[:, None] + START + cols[None, :], y.to(y_rows.dtype.element_ty), mask=written[:, None] & within)


@triton.jit
def finish_heads(
    part,
    rows,
    y_rows,
    stride_y_head,
    read,
    written,
    cos_rows,
    sin_rows,
    worn,
    first_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Scale and rotate some heads of one part, with the same cos and sin; only scale them where ROTARY is 0."""
    HALF: tl.constexpr = ROTARY // 2
    BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    if ROTARY > 0:
        cos_a, cos_b = _load_pairs(cos_rows, read, HALF, BLOCK, INTERLEAVED)
        sin_a, sin_b = _load_pairs(sin_rows, read, HALF, BLOCK, INTERLEAVED)
        if TRANSPOSED:
            sin_a, sin_b = -sin_b, -sin_a
    for index in range(HEADS):
        head = (first_head + index).to(tl.int64)  # the heads of a cache can lie far apart
        x_head = part.x + rows * part.stride_x + head * part.stride_x_head
        y_head = part.y + y_rows + head * stride_y_head
        site = part.site
        if site.l is not None:
            site = Site(site.l + head * site.stride_head, site.stride)
        if ROTARY > 0:
            a, b = _load_pairs(x_head, read, HALF, BLOCK, INTERLEAVED)
            if site.l is not None:
                s_a, s_b = _scale_pairs(site, worn, HALF, BLOCK, INTERLEAVED)
                if not TRANSPOSED:
                    a *= s_a
                    b *= s_b
            y_a = a * cos_a - b * sin_a
            y_b = b * cos_b + a * sin_b
            if site.l is not None and TRANSPOSED:
                y_a *= s_a
                y_b *= s_b
            _store_pairs(y_head, y_a, y_b, written, HALF, BLOCK, INTERLEAVED)
        if ROTARY < D:
            _scale_rest(x_head, y_head, read, written, site, worn, ROTARY, D)
