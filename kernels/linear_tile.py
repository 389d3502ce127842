"""What the kernels of a linear layer share: a launch's layers, the order of tiles, and what follows the sum over K."""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.mixes import scaled


class Epilogue(NamedTuple):
    """What follows the sum over K of one layer of a launch. Where there are two, l_out has the same stride in both."""

    bias: Tensor | None
    """[N], contiguous."""
    l_out: Tensor | None
    """[capacity, N], any row stride, columns contiguous."""


class Layer(NamedTuple):
    """One linear layer of a launch, as long as nothing moves. A launch takes one, or two that read the same x."""

    weight: Tensor
    """[N, K], any strides."""
    bias: Tensor | None
    l_out: Tensor | None

    @property
    def epilogue(self) -> Epilogue:
        """What follows the sum over K."""
        return Epilogue(self.bias, self.l_out)


def of_layers(operands: Sequence[tuple[object, object, object]]) -> tuple[object, ...]:
    """Return a kernel's arguments of one layer or of two, three each: those of a second that there is not are None."""
    first, second = (*operands, (None, None, None))[:2]
    return *first, *second


@triton.jit
def add_part(acc, part, k, K):
    """Return acc and part, two sums of fp32; where a chain of products ends at k, part is added to acc, and is 0 again.

    Each addition rounds: K products in order err by about K/√2 roundings, and chains of c, one behind the other, by
    √(K c + K²/c)/√2, least at c = √K. 14,336 in order err 5 to 7 times as much as a library's kernels, which add parts;
    128 in order, and then 112 such parts, err as little as those, and so do chains of 32 where K is some hundred. The
    tensor cores add several products before they round, and what they read is coarser: bf16 and fp16 need no parts.
    """
    chain = 128
    if K < 2048:
        chain = 32
    if k % chain == 0:
        acc += part
        part = tl.zeros_like(part)
    return acc, part


@triton.jit
def tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the (first row, first column) of a tile: GROUP_M row blocks share a column of W while it is in L2."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP_M
    group = min(blocks_m - first, GROUP_M)
    return (first + tile % per_group % group) * BLOCK_M, tile % per_group // group * BLOCK_N


@triton.jit
def finish(
    acc,  # fp32 [rows, columns]
    row,
    col,
    y,  # a pointer to [M, N], contiguous; or a tensor descriptor with blocks [rows, PIECE]
    bias_ptr,
    site,
    worn,
    M,
    N,
    PIECE: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):
    """Add the bias to acc, the part of y that begins at (row, col); scale, round and store it.

    This goes PIECE columns at a time: a scale as large as the accumulator does not fit the registers beside it.
    """
    width: tl.constexpr = acc.shape[1]
    if width > PIECE:
        half: tl.constexpr = width // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, half]), [0, 2, 1]))
        finish(left, row, col, y, bias_ptr, site, worn, M, N, PIECE, BY_DESCRIPTOR)
        finish(right, row, col + half, y, bias_ptr, site, worn, M, N, PIECE, BY_DESCRIPTOR)
    else:
        cols = col + tl.arange(0, width)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if site.l is not None:
            acc = scaled(acc, site, worn, cols, N)
        if BY_DESCRIPTOR:
            y.store([row, col], acc.to(y.dtype))
        else:
            rows = row + tl.arange(0, acc.shape[0])
            y_ptrs = y + rows.to(tl.int64)[:, None] * N + cols[None, :]
            tl.store(y_ptrs, acc.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])
