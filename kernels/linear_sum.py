"""The second half of split-K: the partial sums of a linear layer, added in their order, biased, scaled and rounded."""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.launch import run
from ia3rt.kernels.linear_tile import Layer, finish, of_layers, tile_of
from ia3rt.kernels.mixes import ROUTING, Routing, Site, worn_by

SUM_TILE = 4, 128
"""Rows and columns of y that a program adds up."""


@triton.jit(do_not_specialize=[*ROUTING, "splits"])
def sum_kernel(
    epilogue_a,
    y_a,  # [M, N], contiguous
    partial_a,  # fp32 [splits, M, N], contiguous
    epilogue_b,  # and those of the second layer; None where there is one
    y_b,
    partial_b,
    stride_l_out,
    splits,
    N,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the partial sums of one tile of y_a or of y_b, and finish it."""
    tile = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if y_b is not None:  # noqa: SIM102  (this is known when the kernel is compiled, and what follows is not)
        if tile >= tiles:
            tile -= tiles
            epilogue_a, y_a, partial_a = epilogue_b, y_b, partial_b
    row, col = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M=1)
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in range(splits):
        partial_rows = (split * M + rows).to(tl.int64)[:, None]
        acc += tl.load(partial_a + partial_rows * N + cols[None, :], mask=inside, other=0.0)
    worn = worn_by(rows, Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr))
    site = Site(epilogue_a.l_out, stride_l_out)
    finish(acc, row, col, y_a, epilogue_a.bias, site, worn, M, N, BLOCK_N, BY_DESCRIPTOR=False)


def add_partials(layers: Sequence[Layer], ys: Sequence[Tensor], partials: Tensor, routing: Routing) -> None:
    """Write y of one layer, or of two that are alike, from linear_kernel's partials, fp32 [layers, splits, M, N]."""
    _, splits, M, N = partials.shape
    operands = [(layer.epilogue, y, partial) for layer, y, partial in zip(layers, ys, partials, strict=True)]
    rows, cols = SUM_TILE
    run(
        sum_kernel,
        (len(layers) * triton.cdiv(M, rows) * triton.cdiv(N, cols),),
        *of_layers(operands),
        Site.of(layers[0].l_out).stride,
        splits,
        N,
        *routing,
        BLOCK_M=rows,
        BLOCK_N=cols,
        num_warps=4,
        enable_fp_fusion=True,  # the default is not the same in every Triton
    )
