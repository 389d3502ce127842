"""y = s ∘ x: an activation scaled by the mix that each of its rows wears (IA³, Liu et al. 2022, section 3.3).

A mix over adapters j < n, with vectors l_j (rows of the bank) and weights w_j, is at one site

    product   s = Π_j l_j              (n = 0: all ones)
    linear    s = Σ_j w_j l_j

One row of the mix table is int32 [2 + 2K]: mode (0 product, 1 linear), n, K bank row ids, K weights (fp32 bits).
The route is int32 [R]: row m of M wears mix route[m // (M // R)]. R = 1 is "uniform": all rows wear mix route[0].

`load_slots` and `mixed_scale` are what the other kernels build their scales with. A uniform batch is the tile with
one row, which then broadcasts, so both cases are one code path. Everything is computed in fp32 and rounded once.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.configs import scale_config


@triton.jit
def load_slots(route_ptr, rows, M, rows_per_mix, UNIFORM: tl.constexpr):
    """Return the mix table row of each activation row: int32 [1] where UNIFORM, else [BLOCK_M]."""
    if UNIFORM:
        index = tl.arange(0, 1)
    else:
        # Rows past the end wear the last row's mix: a valid slot, which adds no step to the loop over adapters.
        worn = tl.minimum(rows, M - 1)
        index = worn // rows_per_mix
    return tl.load(route_ptr + index)


@triton.jit
def _fold(s, j, live, product, ids_ptr, mix_size, l_ptr, stride_l, cols, in_width):
    """Fold adapter j of each row's mix into s. Rows whose mix is shorter get the neutral element, and load nothing."""
    ids = tl.load(ids_ptr + j, mask=live, other=0).to(tl.int64)  # a large bank has more than 2**31 numbers
    w = tl.load(ids_ptr + mix_size + j, mask=live, other=0).to(tl.float32, bitcast=True)
    l_rows = (l_ptr + ids * stride_l)[:, None] + cols[None, :]
    l_j = tl.load(l_rows, mask=live[:, None] & in_width[None, :], other=1.0).to(tl.float32)
    return tl.where(product[:, None], s * l_j, s + w[:, None] * l_j)


@triton.jit
def mixed_scale(l_ptr, stride_l, mixes_ptr, mix_size, slots, cols, width, UNROLL: tl.constexpr):
    """Return s as fp32 [len(slots), len(cols)]: the mixes `slots` at columns `cols` of one site.

    With UNROLL = 0 the loop runs to the longest of these mixes. Inside another loop pass UNROLL = K, the table's
    capacity: a nested dynamic loop would keep Triton from pipelining the outer one. Columns past `width` are undefined.
    """
    mix_ptr = mixes_ptr + slots * (2 + 2 * mix_size)
    product = tl.load(mix_ptr) == 0
    count = tl.load(mix_ptr + 1)
    in_width = cols < width
    s = tl.where(product, 1.0, 0.0)[:, None] + tl.zeros([1, cols.shape[0]], tl.float32)
    if UNROLL > 0:
        for j in tl.static_range(UNROLL):
            s = _fold(s, j, j < count, product, mix_ptr + 2, mix_size, l_ptr, stride_l, cols, in_width)
    else:
        for j in range(tl.max(count, axis=0)):
            s = _fold(s, j, j < count, product, mix_ptr + 2, mix_size, l_ptr, stride_l, cols, in_width)
    return s


@triton.jit(do_not_specialize=["M", "rows_per_mix", "mix_size"])
def scale_kernel(
    x_ptr,  # [M, N], columns contiguous
    y_ptr,  # [M, N], contiguous; or x, where IN_PLACE
    l_ptr,  # [capacity, N], columns contiguous
    mixes_ptr,
    route_ptr,
    M,
    N,
    stride_x,
    stride_l,
    mix_size,
    rows_per_mix,
    UNIFORM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scale one tile. Programs that share columns of the bank are neighbours, so that these stay in L2."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = load_slots(route_ptr, rows, M, rows_per_mix, UNIFORM)
    s = mixed_scale(l_ptr, stride_l, mixes_ptr, mix_size, slots, cols, N, UNROLL=0)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    rows = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * stride_x + cols[None, :], mask=inside)
    y = x.to(tl.float32) * s
    y_rows = rows * stride_x if IN_PLACE else rows * N
    tl.store(y_ptr + y_rows + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def mix_size(mixes: Tensor) -> int:
    """Return K, the largest number of adapters that a row of this mix table can name."""
    return (mixes.shape[1] - 2) // 2


def scale(x: Tensor, l: Tensor, mixes: Tensor, route: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: E741
    """Return s ∘ x, computed in fp32 and rounded once to x.dtype.

    Args:
        x: [M, N], fp16, bf16 or fp32; any row stride, columns contiguous.
        l: [capacity, N], a site's slice of the bank; any row stride, columns contiguous, any of the dtypes above.
        mixes: int32 [slots, 2 + 2K], contiguous.
        route: int32 [R], contiguous, M % R == 0.
        out: x itself, or [M, N] of x.dtype, contiguous; made where None.

    """
    M, N = x.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device) if out is None else out
    if M == 0:
        return y
    uniform = route.numel() == 1
    config = scale_config(M, N, uniform)
    grid = (triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n))
    scale_kernel[grid](
        x,
        y,
        l,
        mixes,
        route,
        M,
        N,
        x.stride(0),
        l.stride(0),
        mix_size(mixes),
        M // route.numel(),
        UNIFORM=uniform,
        IN_PLACE=out is x,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        enable_fp_fusion=True,  # the default is not the same in every Triton
    )
    return y
