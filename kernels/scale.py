"""y = s ∘ x: an activation scaled by the mix that each of its rows wears (mixes.py).

Everything is computed in fp32 and rounded once.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.configs import scale_config
from ia3rt.kernels.launch import run
from ia3rt.kernels.mixes import ROUTING, Routing, Site, mixed_scale, worn_by


@triton.jit(do_not_specialize=ROUTING)
def scale_kernel(
    x_ptr,  # [M, N], columns contiguous
    y_ptr,  # [M, N], contiguous; or x, where IN_PLACE
    site,  # of width N
    stride_x,
    N,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    IN_PLACE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scale one tile. Programs that share columns of the bank are neighbours, so that these stay in L2."""
    routing = Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = mixed_scale(site, worn_by(rows, routing), cols, N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    rows = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * stride_x + cols[None, :], mask=inside)
    y = x.to(tl.float32) * s
    y_rows = rows * stride_x if IN_PLACE else rows * N
    tl.store(y_ptr + y_rows + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


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
    routing = Routing.of(mixes, route, M)
    config = scale_config(M, N, routing.is_uniform)
    grid = (triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n))
    run(
        scale_kernel,
        grid,
        x,
        y,
        Site.of(l),
        x.stride(0),
        N,
        *routing,
        IN_PLACE=out is x,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        enable_fp_fusion=True,  # the default is not the same in every Triton
    )
    return y
