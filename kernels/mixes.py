"""s: what the mix that a row wears is at a site (IA³, Liu et al. 2022, section 3.3), and how kernels are told of both.

A mix over adapters j < n, with vectors l_j (rows of the bank) and weights w_j, is at one site

    product   s = Π_j l_j              (n = 0: all ones)
    linear    s = Σ_j w_j l_j

One row of the mix table is int32 [2 + 2K]: mode (0 product, 1 linear), n, K bank row ids, K weights (fp32 bits).
The route is int32 [R]: row m of M wears mix route[m // (M // R)]. R = 1 is "uniform": all rows wear mix route[0].

A launcher lays out a Site for each vector, which stays while the vector is where it is, and one Routing, which is of
this forward. A kernel asks `worn_by` for what the rows of its tile wear, and `mixed_scale` for s in fp32. A uniform
batch is the tile with one row, which then broadcasts, so both cases are one code path.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

ROUTING = ["M", "mix_size", "rows_per_mix"]
"""The numbers of a Routing, as kernels name them. They are not specialised: no value of theirs is worth other code."""


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


class Worn(NamedTuple):
    """What the rows of a tile wear, inside a kernel."""

    mixes: Tensor
    mix_size: int
    slots: Tensor
    """The mix table's row of each: int32 [rows], or [1] where all rows wear one mix."""


def mix_size(mixes: Tensor) -> int:
    """Return K, the largest number of adapters that a row of this mix table can name."""
    return (mixes.shape[1] - 2) // 2


@triton.jit
def worn_by(rows, routing):
    """Return what these activation rows wear."""
    if routing.rows_per_mix is None:
        index = tl.arange(0, 1)
    else:
        # Rows past the end wear the last row's mix: a valid slot, which adds no step to the loop over adapters.
        index = tl.minimum(rows, routing.rows - 1) // routing.rows_per_mix
    return Worn(routing.mixes, routing.mix_size, tl.load(routing.route + index))


@triton.jit
def _fold(s, j, live, product, ids_ptr, mix_size, site, cols, in_width):
    """Fold adapter j of each row's mix into s. Rows whose mix is shorter get the neutral element, and load nothing."""
    ids = tl.load(ids_ptr + j, mask=live, other=0).to(tl.int64)  # a large bank has more than 2**31 numbers
    w = tl.load(ids_ptr + mix_size + j, mask=live, other=0).to(tl.float32, bitcast=True)
    l_rows = (site.l + ids * site.stride)[:, None] + cols[None, :]
    l_j = tl.load(l_rows, mask=live[:, None] & in_width[None, :], other=1.0).to(tl.float32)
    return tl.where(product[:, None], s * l_j, s + w[:, None] * l_j)


@triton.jit
def mixed_scale(site, worn, cols, width, UNROLL: tl.constexpr):
    """Return s as fp32 [len(worn.slots), len(cols)]: the mixes that are worn, at columns `cols` of a site.

    With UNROLL = 0 the loop runs to the longest of these mixes. Inside another loop pass UNROLL = K, the table's
    capacity: a nested dynamic loop would keep Triton from pipelining the outer one. Columns past `width` are undefined.
    """
    mix_ptr = worn.mixes + worn.slots * (2 + 2 * worn.mix_size)
    product = tl.load(mix_ptr) == 0
    count = tl.load(mix_ptr + 1)
    in_width = cols < width
    s = tl.where(product, 1.0, 0.0)[:, None] + tl.zeros([1, cols.shape[0]], tl.float32)
    if UNROLL > 0:
        for j in tl.static_range(UNROLL):
            s = _fold(s, j, j < count, product, mix_ptr + 2, worn.mix_size, site, cols, in_width)
    else:
        for j in range(tl.max(count, axis=0)):
            s = _fold(s, j, j < count, product, mix_ptr + 2, worn.mix_size, site, cols, in_width)
    return s
