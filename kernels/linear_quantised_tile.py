"""One tile of a quantised weight, dequantised in registers: see linear_quantised.py for the formats."""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

E4M3_REBIAS = tl.constexpr(2.0**120)  # fp32's exponent bias, 127, less that of e4m3, 7


@triton.jit
def load_values(weight_ptr, k, cols, N, K, stride_w, KIND: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the stored values of W^T at rows k, k + 1, … and columns cols, [BLOCK_K, len(cols)], not yet scaled.

    Columns past the end wrap around; rows past it are zero.
    """
    cols = (cols % N).to(tl.int64)
    if KIND == "int4":
        # The two nibbles of a byte are neighbours along K, the lower one first.
        tl.static_assert(BLOCK_K >= 32, "see INT4_STEP in quantised_configs.py")
        halves = k // 2 + tl.arange(0, BLOCK_K // 2)
        pairs = weight_ptr + cols[:, None] * stride_w + halves[None, :]
        pair = tl.load(pairs, mask=(halves < K // 2)[None, :], other=0).to(tl.int8, bitcast=True).to(tl.int32)
        values = tl.join((pair << 28) >> 28, pair >> 4)
        return tl.trans(tl.reshape(values, [cols.shape[0], BLOCK_K]))
    elif KIND == "gptq":
        eighths = k // 8 + tl.arange(0, BLOCK_K // 8)
        words = weight_ptr + eighths.to(tl.int64)[:, None] * stride_w + cols[None, :]
        word = tl.load(words, mask=(eighths < K // 8)[:, None], other=0)
        values = (word[:, None, :] >> (4 * tl.arange(0, 8))[None, :, None]) & 15
        return tl.reshape(values, [BLOCK_K, cols.shape[0]])
    else:
        ks = k + tl.arange(0, BLOCK_K)
        values = tl.load(weight_ptr + cols[None, :] * stride_w + ks[:, None], mask=(ks < K)[:, None], other=0)
        if KIND == "fp8_bits":
            bits = values.to(tl.int32)
            sign_and_rest = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
            number = sign_and_rest.to(tl.float32, bitcast=True) * E4M3_REBIAS
            return tl.where((bits & 0x7F) == 0x7F, float("nan"), number)
        elif KIND == "fp8":
            return values.to(tl.float8e4nv, bitcast=True)
        else:
            return values.to(tl.float32)


@triton.jit
def scale_values(
    values,  # [BLOCK_K, BLOCK_N] of load_values
    scales_ptr,  # [K / g, N], contiguous
    zeros_ptr,  # as scales_ptr; for GPTQ int32 [K / g, N / 8]
    groups_ptr,  # int32 [K], the group of each k; or None: k // g
    k,
    cols,
    N,
    K,
    group_size,
    KIND: tl.constexpr,
    ONE_GROUP: tl.constexpr,  # whether the tile lies within one group
    PLUS_ONE: tl.constexpr,
):
    """Return the values in fp32, scaled and shifted by their groups."""
    cols = cols % N
    ks = k + tl.arange(0, 1 if ONE_GROUP else values.shape[0])
    inside = (ks < K)[:, None]
    group = ks // group_size if groups_ptr is None else tl.load(groups_ptr + ks, mask=ks < K, other=0)
    group = group.to(tl.int64)[:, None]
    scale = tl.load(scales_ptr + group * N + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if KIND == "gptq":
        word = tl.load(zeros_ptr + group * (N // 8) + (cols // 8)[None, :], mask=inside, other=0)
        zero = (word >> (4 * (cols % 8))[None, :]) & 15
        if PLUS_ONE:
            zero += 1
        return (values - zero).to(tl.float32) * scale
    else:
        zero = tl.load(zeros_ptr + group * N + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        return values.to(tl.float32) * scale + zero
