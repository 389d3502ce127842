"""y = s_out ∘ (W (s_in ∘ x) + b): a linear layer with an input and an output site (IA³, Liu et al. 2022, section 3.3).

s_in and s_out are what each row's mix is at the two sites (scale.py); either may be absent. The output scale costs one
multiply in the epilogue. The input scale is applied to the tiles of x for a few rows, where the weight is all the
traffic; for many rows it would force x through registers and make every wgmma wait, so x is scaled beforehand.

s_in ∘ x is rounded to the dtype of x, for the tensor cores; the rest is accumulated, biased and scaled in fp32 and
rounded once.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.configs import LinearConfig, arch_of, linear_config
from ia3rt.kernels.scale import load_slots, mix_size, mixed_scale, scale

FUSED_INPUT_ROWS = 32
"""The most rows for which the input scale is applied inside the GEMM."""

FUSED_INPUT_READS = 32
"""The most bank rows read for it beside each tile of W: more would be the traffic, and would fill shared memory."""


def fuses_input(rows: int, size: int, uniform: bool) -> bool:
    """Return whether the GEMM itself scales x, for `rows` rows and mixes of up to `size` adapters."""
    padded = 1 if uniform else max(16, triton.next_power_of_2(rows))
    return rows <= FUSED_INPUT_ROWS and size <= 8 and padded * size <= FUSED_INPUT_READS


@triton.jit
def _tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the (row block, column block) of a program: GROUP_M row blocks share a column of W while it is in L2."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = pid // per_group * GROUP_M
    group = min(blocks_m - first, GROUP_M)
    return first + pid % per_group % group, pid % per_group // group


@triton.jit
def _finish(acc, rows, first, y_ptr, bias_ptr, l_out_ptr, stride_l_out, mixes_ptr, mix_size, slots, M, N):
    """Add the bias to the columns of acc, which begin at column `first` of y; scale, round and store them."""
    cols = first + tl.arange(0, acc.shape[1])
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if l_out_ptr is not None:
        acc *= mixed_scale(l_out_ptr, stride_l_out, mixes_ptr, mix_size, slots, cols, N, UNROLL=0)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["M", "mix_size", "rows_per_mix"])
def linear_kernel(
    x_ptr,  # [M, K], columns contiguous
    weight_ptr,  # [N, K], any strides
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], contiguous
    l_in_ptr,  # [capacity, K], columns contiguous, or None
    l_out_ptr,  # [capacity, N], columns contiguous, or None
    mixes_ptr,
    route_ptr,
    M,
    N,
    K,
    stride_x,
    stride_wn,
    stride_wk,
    stride_l_in,
    stride_l_out,
    mix_size,
    rows_per_mix,
    UNIFORM: tl.constexpr,
    UNROLL: tl.constexpr,  # the mix table's capacity, where there is an l_in
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute one [BLOCK_M, BLOCK_N] tile of y."""
    block_m, block_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = load_slots(route_ptr, rows, M, rows_per_mix, UNIFORM)

    # Rows and columns past the end wrap around: they are computed from real data and never stored, and the loop over K
    # needs no mask for them. Offsets are 64-bit, as x and W may have more than 2**31 elements.
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_x + ks[None, :]
    w_ptrs = weight_ptr + (cols % N).to(tl.int64)[None, :] * stride_wn + ks[:, None] * stride_wk
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=(ks < K - k)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(ks < K - k)[:, None], other=0.0)
        if l_in_ptr is not None:
            s_in = mixed_scale(l_in_ptr, stride_l_in, mixes_ptr, mix_size, slots, k + ks, K, UNROLL)
            x = (x.to(tl.float32) * s_in).to(x_ptr.dtype.element_ty)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk

    first = block_n * BLOCK_N
    if UNIFORM or BLOCK_N < 128:
        _finish(acc, rows, first, y_ptr, bias_ptr, l_out_ptr, stride_l_out, mixes_ptr, mix_size, slots, M, N)
    else:
        # A scale as large as the whole accumulator does not fit the registers beside it: one half, then the other.
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
        _finish(left, rows, first, y_ptr, bias_ptr, l_out_ptr, stride_l_out, mixes_ptr, mix_size, slots, M, N)
        first += BLOCK_N // 2
        _finish(right, rows, first, y_ptr, bias_ptr, l_out_ptr, stride_l_out, mixes_ptr, mix_size, slots, M, N)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """Return s_out ∘ (W (s_in ∘ x) + b) in x.dtype.

    Args:
        x: [M, K], fp16, bf16 or fp32; any row stride, columns contiguous.
        weight: [N, K] of x.dtype, any strides.
        bias: [N], contiguous, or None.
        l_in: [capacity, K], the input site's slice of the bank; any row stride, columns contiguous; or None.
        l_out: [capacity, N], the same for the output site; or None.
        mixes: int32 [slots, 2 + 2K], contiguous.
        route: int32 [R], contiguous, M % R == 0.
        out: [M, N] of x.dtype, contiguous; made where None.
        config: block sizes; chosen by shape and device where None.

    """
    M, K = x.shape
    N = weight.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device) if out is None else out
    if M == 0:
        return y
    uniform = route.numel() == 1
    if l_in is not None and not fuses_input(M, mix_size(mixes), uniform):
        x, l_in = scale(x, l_in, mixes, route), None
    config = config or linear_config(
        M, N, K, x.dtype, arch_of(x.device), per_row=not uniform, scales_input=l_in is not None
    )
    grid = (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)
    linear_kernel[grid](
        x,
        weight,
        bias,
        y,
        l_in,
        l_out,
        mixes,
        route,
        M,
        N,
        K,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        0 if l_in is None else l_in.stride(0),
        0 if l_out is None else l_out.stride(0),
        mix_size(mixes),
        M // route.numel(),
        UNIFORM=uniform,
        UNROLL=0 if l_in is None else mix_size(mixes),
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # the default is not the same in every Triton
    )
    return y
