"""y = s_out ∘ (W_q (s_in ∘ x) + b): a linear layer whose weight is kept quantised, and stays so.

The weight is dequantised in registers, and is written nowhere in another dtype; but for many rows on sm_90 and in fp32,
where it is dequantised once for torch to multiply (dequantise.py), into memory that is freed behind it. With q the
stored values, g the size of a group of neighbours along K:

    int8     W[n, k] = q[n, k] scale[n]                              q int8 [N, K]
    fp8      W[n, k] = q[n, k] scale[n]                              q e4m3fn [N, K]
    int4     W[n, k] = q[n, k] scale[k / g, n] + zero[k / g, n]      q -8…7, the lower nibble first, int8 [N, K/2]
    gptq     W[n, k] = scale[h, n] (q[n, k] - z[h, n] - 1)           q 0…15, int32 [K/8, N], z int32 [K/g, N/8], the
                                                                     lowest nibble first; h = g_idx[k], or k / g
    gptq_v2  the same without the - 1

The first three are torchao's plain layouts, the others GPTQ's, as AutoGPTQ and GPTQModel store it (Frantar et al.
2022). A scale that belongs to a channel multiplies the fp32 sum, as s_out does, so that an output vector costs no
rounding of the weight. A group's is applied to the tile of W, which is rounded to the dtype of x, for the tensor cores.

s_in has a pass of its own before. Up to 64 rows, programs share the sum of a tile, as in linear.py.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.configs import arch_of, card_of, processors_of
from ia3rt.kernels.dequantise import dequantise
from ia3rt.kernels.launch import precision_of, run
from ia3rt.kernels.linear import multiply
from ia3rt.kernels.linear_quantised_tile import load_values, scale_values
from ia3rt.kernels.linear_sum import add_partials
from ia3rt.kernels.linear_tile import Layer, add_part, finish, tile_of
from ia3rt.kernels.mixes import ROUTING, Routing, Site, worn_by_tile
from ia3rt.kernels.quantised_configs import linear_quantised_config
from ia3rt.kernels.scale import scale
from ia3rt.kernels.tuned import LinearConfig


@triton.jit(do_not_specialize=ROUTING)
def linear_quantised_kernel(
    x_ptr,  # [M, K], columns contiguous
    weight_ptr,
    scales_ptr,
    zeros_ptr,  # or None
    groups_ptr,  # or None
    group_size,
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], contiguous; where SPLIT fp32 [programs along axis 1, M, N]
    site_out,  # of width N
    stride_x,
    stride_w,
    K,
    N,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    TWO_MIXES: tl.constexpr,  # whether a tile wears two mixes at most
    SPLIT: tl.constexpr,  # whether the programs along axis 1 share a sum
    KIND: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Compute one tile of y; or a share of its sum."""
    row, col = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    begin, end = 0, K
    if SPLIT:
        share = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        begin = tl.program_id(1) * share
        end = min(K, begin + share)

    x_rows = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_x
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    IN_PARTS: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    if IN_PARTS:
        part = acc
    for k in range(begin, end, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + ks[None, :], mask=(ks < K)[None, :], other=0.0)
        w = load_values(weight_ptr, k, cols, N, K, stride_w, KIND, BLOCK_K)
        if zeros_ptr is not None:
            w = scale_values(w, scales_ptr, zeros_ptr, groups_ptr, k, cols, N, K, group_size, KIND, ONE_GROUP, PLUS_ONE)
        if IN_PARTS:
            part = tl.dot(x, w.to(tl.float32), part, input_precision=PRECISION)
            acc, part = add_part(acc, part, k + BLOCK_K, K)
        else:
            acc = tl.dot(x, w.to(x_ptr.dtype.element_ty), acc, input_precision=PRECISION)
    if IN_PARTS:
        acc += part
    if zeros_ptr is None:
        acc *= tl.load(scales_ptr + cols % N).to(tl.float32)[None, :]

    if SPLIT:
        partial_rows = (tl.program_id(1) * M + rows).to(tl.int64)[:, None]
        tl.store(y_ptr + partial_rows * N + cols[None, :], acc, mask=(rows < M)[:, None] & (cols < N)[None, :])
    else:
        worn = worn_by_tile(row, Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr), BLOCK_M, TWO_MIXES)
        finish(acc, row, col, y_ptr, bias_ptr, site_out, worn, M, N, PIECE, BY_DESCRIPTOR=False)


def linear_quantised(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
    kind: str,
    group_size: int,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """Return s_out ∘ (W_q (s_in ∘ x) + b) in x.dtype.

    Args:
        x: [M, K], fp16, bf16 or fp32; any row stride, columns contiguous.
        weight: q, as `kind` packs it; any row stride, columns contiguous.
        scales: [N], or [K / group_size, N]; contiguous, any floating dtype.
        zeros: None, or [K / group_size, N], or int32 [K / group_size, N / 8]; contiguous.
        groups: g_idx, int32 [K], or None.
        bias: [N], contiguous, or None.
        l_in: [capacity, K], the input site's slice of the bank; any row stride, columns contiguous; or None.
        l_out: [capacity, N], the same for the output site; or None.
        mixes: int32 [slots, 2 + 2K], contiguous.
        route: int32 [R], contiguous, M % R == 0.
        kind: one of the above.
        group_size: g; 0 where a scale belongs to a channel.
        out: [M, N] of x.dtype, contiguous; made where None.
        config: block sizes; chosen by shape and device where None.

    """
    (M, K), N = x.shape, scales.shape[-1]
    y = x.new_empty((M, N)) if out is None else out
    if M == 0:
        return y
    if l_in is not None:
        x = scale(x, l_in, mixes, route)
    routing = Routing.of(mixes, route, M)
    config = config or plan(x, N, kind, group_size, routing.per_row, groups is not None)
    if config is None:
        return dequantised(x, weight, scales, zeros, groups, bias, None, l_out, mixes, route, kind, group_size, y)
    weight, layout = _laid_out(weight, kind)
    splits = config.splits
    partials = x.new_empty((1, splits, M, N), dtype=torch.float32) if splits > 1 else None
    run(
        linear_quantised_kernel,
        (config.tiles(M, N), splits),
        x,
        weight,
        scales,
        zeros,
        groups,
        group_size,
        bias,
        y if partials is None else partials,
        Site.of(l_out),
        x.stride(0),
        weight.stride(0),
        K,
        N,
        *routing,
        TWO_MIXES=routing.two_mixes(config.block_m),
        SPLIT=splits > 1,
        KIND=layout,
        ONE_GROUP=group_size > 0 and groups is None and group_size % config.block_k == 0,
        PLUS_ONE=kind == "gptq",
        PRECISION=precision_of(x.dtype),
        **config.build_options(),
    )
    if partials is not None:
        add_partials([Layer(weight, bias, l_out)], [y], partials, routing)
    return y


def dequantised(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    bias: Tensor | None,
    l_in: Tensor | None,
    l_out: Tensor | None,
    mixes: Tensor,
    route: Tensor,
    kind: str,
    group_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return the same, of W dequantised into memory of its own, for torch to multiply; scales are passes too."""
    y = x.new_empty((x.shape[0], scales.shape[-1])) if out is None else out
    if l_in is not None:
        x = scale(x, l_in, mixes, route)
    stored, layout = _laid_out(weight, kind)
    dense = dequantise(stored, scales, zeros, groups, layout, kind == "gptq", group_size, x.shape[1], x.dtype)
    multiply(x, [Layer(dense, None if bias is None else bias.to(x.dtype), l_out)], [y], mixes, route)
    return y


def _laid_out(weight: Tensor, kind: str) -> tuple[Tensor, str]:
    """Return a stored weight as the kernels read it, and how it is packed."""
    if kind == "fp8":
        return weight.view(torch.uint8), "fp8" if _converts_fp8(arch_of(weight.device)) else "fp8_bits"
    return weight, kind.removesuffix("_v2")


def plan(x: Tensor, N: int, kind: str, group_size: int, per_row: bool, act_order: bool) -> LinearConfig | None:
    """Return the config of a launch for x [M, K] and y [M, N]; None to dequantise before. The rest is the config's."""
    config: LinearConfig | None = linear_quantised_config(
        x.shape[0],
        N,
        x.shape[1],
        x.dtype,
        arch_of(x.device),
        processors_of(x.device),
        kind,
        group_size,
        per_row=per_row,
        act_order=act_order,
        card=card_of(x.device),
    )
    return config


def _converts_fp8(arch: str) -> bool:
    """Return whether Triton converts e4m3fn there; elsewhere the kernel moves the bits itself."""
    return arch.startswith("sm_") and int(arch[3:]) >= 89
