"""W of a quantised linear layer in the dtype of x: for many rows it is dequantised once, and torch multiplies.

The formats are those of linear_quantised.py, and so is the arithmetic: fp32, rounded once.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.launch import run
from ia3rt.kernels.linear_quantised_tile import load_values, scale_values


@triton.jit
def dequantise_kernel(
    out_ptr,  # [N, K], one stride is 1
    stride_n,
    stride_k,
    weight_ptr,
    scales_ptr,
    zeros_ptr,  # or None
    groups_ptr,  # or None
    group_size,
    stride_w,
    K,
    N,
    KIND: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Dequantise one tile."""
    k = tl.program_id(0) * BLOCK_K
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = load_values(weight_ptr, k, cols, N, K, stride_w, KIND, BLOCK_K)
    if zeros_ptr is None:
        w = w.to(tl.float32) * tl.load(scales_ptr + cols % N).to(tl.float32)[None, :]
    else:
        w = scale_values(w, scales_ptr, zeros_ptr, groups_ptr, k, cols, N, K, group_size, KIND, ONE_GROUP, PLUS_ONE)
    ks = k + tl.arange(0, BLOCK_K)
    places = out_ptr + cols.to(tl.int64)[None, :] * stride_n + ks.to(tl.int64)[:, None] * stride_k
    tl.store(places, w.to(out_ptr.dtype.element_ty), mask=(ks < K)[:, None] & (cols < N)[None, :])


def dequantise(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    layout: str,
    plus_one: bool,
    group_size: int,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return W [N, K] in `dtype`: in rows, but for GPTQ, whose columns are contiguous, as they are stored.

    Args:
        weight: q, as `layout` packs it; any row stride, columns contiguous.
        scales: [N], or [K / group_size, N]; contiguous, any floating dtype.
        zeros: None, or [K / group_size, N], or int32 [K / group_size, N / 8]; contiguous.
        groups: g_idx, int32 [K], or None.
        layout: int8, fp8, fp8_bits, int4 or gptq.
        plus_one: whether GPTQ's zeros are stored less one.
        group_size: g; 0 where a scale belongs to a channel.
        K: the columns of W.
        dtype: fp16, bf16 or fp32.

    """
    N = scales.shape[-1]
    if layout == "gptq":
        dense, (block_n, block_k) = scales.new_empty((K, N), dtype=dtype).t(), (128, 32)
    else:
        dense, (block_n, block_k) = scales.new_empty((N, K), dtype=dtype), (32, 128)
    run(
        dequantise_kernel,
        (triton.cdiv(K, block_k), triton.cdiv(N, block_n)),
        dense,
        *dense.stride(),
        weight,
        scales,
        zeros,
        groups,
        group_size,
        weight.stride(0),
        K,
        N,
        KIND=layout,
        ONE_GROUP=group_size > 0 and groups is None and group_size % block_k == 0,
        PLUS_ONE=plus_one,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        enable_fp_fusion=True,  # the default is not the same in every Triton
    )
    return dense
