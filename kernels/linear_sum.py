"""The second half of split-K: the partial sums of a linear layer, added in their order, biased, scaled and rounded."""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.linear_tile import Layer, finish, tile_of
from ia3rt.kernels.scale import load_slots, mix_size

SUM_TILE = 4, 128
"""Rows and columns of y that a program adds up."""


@triton.jit(do_not_specialize=["splits", "M", "mix_size", "rows_per_mix"])
def sum_kernel(
    bias_a,  # [N] or None
    l_a,  # [capacity, N], columns contiguous, or None
    y_a,  # [M, N], contiguous
    partial_a,  # fp32 [splits, M, N], contiguous
    bias_b,  # and those of the second layer, or None
    l_b,
    y_b,
    partial_b,
    splits,
    mixes_ptr,
    route_ptr,
    M,
    N,
    stride_l_out,
    mix_size,
    rows_per_mix,
    UNIFORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the partial sums of one tile of y_a or of y_b, and finish it."""
    tile = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if y_b is not None:  # noqa: SIM102  (this is known when the kernel is compiled, and what follows is not)
        if tile >= tiles:
            tile -= tiles
            partial_a, y_a = partial_b, y_b
            if bias_a is not None:
                bias_a = bias_b
            if l_a is not None:
                l_a = l_b
    row, col = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M=1)
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in range(splits):
        partial_rows = (split * M + rows).to(tl.int64)[:, None]
        acc += tl.load(partial_a + partial_rows * N + cols[None, :], mask=inside, other=0.0)
    slots = load_slots(route_ptr, rows, M, rows_per_mix, UNIFORM)
    finish(
        acc,
        row,
        col,
        y_a,
        bias_a,
        l_a,
        stride_l_out,
        mixes_ptr,
        mix_size,
        slots,
        M,
        N,
        BLOCK_N,
        BY_DESCRIPTOR=False,
    )


def add_partials(layers: Sequence[Layer], partials: Tensor, mixes: Tensor, route: Tensor) -> None:
    """Write y of one layer, or of two that are alike, from linear_kernel's partials, fp32 [layers, splits, M, N]."""
    _, splits, M, N = partials.shape
    l_out = layers[0].l_out
    arguments: list[Tensor | None] = []
    for layer, partial in zip(layers, partials, strict=True):
        arguments += [*layer[1:], partial]
    rows, cols = SUM_TILE
    sum_kernel[(len(layers) * triton.cdiv(M, rows) * triton.cdiv(N, cols),)](
        *arguments,
        *[None] * (8 - len(arguments)),
        splits,
        mixes,
        route,
        M,
        N,
        0 if l_out is None else l_out.stride(0),
        mix_size(mixes),
        M // route.numel(),
        UNIFORM=route.numel() == 1,
        BLOCK_M=rows,
        BLOCK_N=cols,
        num_warps=4,
        enable_fp_fusion=True,  # the default is not the same in every Triton
    )
