"""s: what the mix that a row wears is at a site (IA³, Liu et al. 2022, section 3.3), and how kernels are told of both.

A mix over adapters j < n, with vectors l_j (rows of the bank) and weights w_j, is at one site

    product   s = Π_j l_j              (n = 0: all ones)
    linear    s = Σ_j w_j l_j

One row of the mix table is int32 [2 + 2K]: mode (0 product, 1 linear), n, K bank row ids, K weights (fp32 bits).
The route is int32 [R]: row m of M wears mix route[m // (M // R)]. R = 1 is "uniform": all rows wear mix route[0].

A launcher lays out a Site for each vector, which stays while the vector is where it is, and one Routing, which is of
this forward. A kernel asks `worn_by` for what the rows of its tile wear, and `mixed_scale` for s in fp32. A uniform
batch is the tile with one row, which then broadcasts, so both cases are one code path. Where a mix has as many rows as
a tile, or more, the tile meets two at most: `worn_by_tile` reads these two, and selects by row.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

ROUTING = ["M", "mix_size", "rows_per_mix"]
"""The numbers of a Routing, as kernels name them. They are not specialised: no value of theirs is worth other code."""

TALLEST = 128
"""The most rows that a tile of a matmul has."""


class Site(NamedTuple):
    """One site's slice of the bank."""

    l: Tensor | None  # noqa: E741
    """[capacity, width], any row stride, columns contiguous, fp16, bf16 or fp32; None where there is no vector."""
    stride: int

    @classmethod
    def of(cls, l: Tensor | None) -> "Site":  # noqa: E741
        """Lay out a slice."""
        return cls(l, 0 if l is None else l.stride(0))


class Routing(NamedTuple):
    """What the rows of a launch wear.

    A kernel takes this as five parameters of its own, *routing, and makes it again of them: in a tuple Triton
    specialises every number, whatever do_not_specialize says. They stand last, behind N: sizes side by side are loaded
    together.
    """

    rows: int
    """M, a multiple of R."""
    mix_size: int
    """K, the largest number of adapters that a mix can name."""
    rows_per_mix: int | None
    """M // R; None where all rows wear one mix, which is other code."""
    mixes: Tensor
    """int32 [slots, 2 + 2K], contiguous."""
    route: Tensor
    """int32 [R], contiguous."""

    @classmethod
    def of(cls, mixes: Tensor, route: Tensor, rows: int) -> "Routing":
        """Lay out what `rows` rows wear."""
        R = route.numel()
        return cls(rows, mix_size(mixes), None if R == 1 else rows // R, mixes, route)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows wear one mix."""
        return self.rows_per_mix is None

    @property
    def per_row(self) -> bool:
        """Whether tiles wear many mixes, of whatever height they are: one a token, or one a row in decoding."""
        return not self.is_uniform and not self.two_mixes(TALLEST)

    def two_mixes(self, block_m: int) -> bool:
        """Return whether a tile of so many rows wears at most two mixes, and not one because all rows do."""
        return self.rows_per_mix is not None and self.rows_per_mix >= block_m


class Mix(NamedTuple):
    """What is read of the mix table once a tile, inside a kernel: loads that wait for each other."""

    entries: Tensor
    """Where each mix's ids begin: pointers [rows], or [1] where the rows wear one mix; so the others, too."""
    is_product: Tensor
    length: Tensor
    most: Tensor
    """The largest length."""
    first_id: Tensor
    """The first adapter, int64: a large bank has more than 2**31 numbers."""
    first_weight: Tensor


class Worn(NamedTuple):
    """What the rows of a tile wear, inside a kernel."""

    mix: Mix
    other: Mix
    """Of a tile of two mixes, that of its last rows; else `mix`."""
    wears_other: Tensor
    """bool [rows]; or [1], False, where the tile is not one of two mixes."""
    has_other: bool | Tensor
    """Whether any row does."""
    mix_size: int


def mix_size(mixes: Tensor) -> int:
    """Return K, the largest number of adapters that a row of this mix table can name."""
    return (mixes.shape[1] - 2) // 2


@triton.jit
def _mix(index, routing):
    """Read what is at these places of the route."""
    entries = routing.mixes + tl.load(routing.route + index) * (2 + 2 * routing.mix_size)
    is_product = tl.load(entries) == 0
    length = tl.load(entries + 1)
    entries += 2
    first_id = tl.load(entries, mask=length > 0, other=0).to(tl.int64)
    first_weight = tl.load(entries + routing.mix_size, mask=length > 0, other=0).to(tl.float32, bitcast=True)
    return Mix(entries, is_product, length, tl.max(length, axis=0), first_id, first_weight)


@triton.jit
def worn_by(rows, routing):
    """Return what these activation rows wear."""
    if routing.rows_per_mix is None:
        index = tl.arange(0, 1)
    else:
        # Rows past the end wear the last row's mix: a valid slot, which adds no step to the loop over adapters.
        index = tl.minimum(rows, routing.rows - 1) // routing.rows_per_mix
    mix = _mix(index, routing)
    return Worn(mix, mix, tl.full([1], False, tl.int1), False, routing.mix_size)


@triton.jit
def worn_by_tile(row, routing, BLOCK_M: tl.constexpr, TWO_MIXES: tl.constexpr):
    """Return what BLOCK_M rows from `row` on wear. TWO_MIXES is Routing.two_mixes: no vector a row, but two a tile."""
    rows = row + tl.arange(0, BLOCK_M)
    if TWO_MIXES:
        index = row // routing.rows_per_mix
        last = (min(row + BLOCK_M, routing.rows) - 1) // routing.rows_per_mix
        wears_other = rows >= (index + 1) * routing.rows_per_mix
        one = tl.arange(0, 1)
        return Worn(_mix(index + one, routing), _mix(last + one, routing), wears_other, last > index, routing.mix_size)
    else:
        return worn_by(rows, routing)


@triton.jit
def _fold(s, live, mix, ids, weights, site, cols, in_width):
    """Fold one adapter of each mix into s. A mix that has none is left as it is, and loads nothing."""
    l_rows = (site.l + ids * site.stride)[:, None] + cols[None, :]
    l_j = tl.load(l_rows, mask=live[:, None] & in_width[None, :], other=1.0).to(tl.float32)
    return tl.where(mix.is_product[:, None], s * l_j, s + weights[:, None] * l_j)


@triton.jit
def _scale_of(mix, mix_size, site, cols, in_width):
    """Return s of these mixes, fp32 [mixes, cols]."""
    s = tl.where(mix.is_product, 1.0, 0.0)[:, None] + tl.zeros([1, cols.shape[0]], tl.float32)
    ids, weights = mix.first_id, mix.first_weight
    for j in range(mix.most):
        s = _fold(s, j < mix.length, mix, ids, weights, site, cols, in_width)
        more = j + 1 < mix.length
        ids = tl.load(mix.entries + j + 1, mask=more, other=0).to(tl.int64)
        weights = tl.load(mix.entries + mix_size + j + 1, mask=more, other=0).to(tl.float32, bitcast=True)
    return s


@triton.jit
def mixed_scale(site, worn, cols, width):
    """Return s as fp32 [rows or 1, len(cols)]: what is worn, at columns `cols` of a site; not of a tile of two mixes.

    Columns past `width` are undefined.
    """
    return _scale_of(worn.mix, worn.mix_size, site, cols, cols < width)


@triton.jit
def scaled(acc, site, worn, cols, width):
    """Return s ∘ acc, for acc fp32 [rows, len(cols)] of a tile, which may be one of two mixes."""
    s = _scale_of(worn.mix, worn.mix_size, site, cols, cols < width)
    if worn.wears_other.shape[0] > 1:
        # One after the other, and the second where there is one: sequences are longer than tiles, most of which wear
        # one mix, and beside the accumulator the registers hold one vector more.
        acc *= tl.where(worn.wears_other[:, None], 1.0, s)
        if worn.has_other:
            other = _scale_of(worn.other, worn.mix_size, site, cols, cols < width)
            acc *= tl.where(worn.wears_other[:, None], other, 1.0)
    else:
        acc *= s
    return acc
