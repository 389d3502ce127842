"""What the attention kernels share: scores, who sees whom, and the loop over the keys of a block of query rows.

A row is a query of one head. With GROUP > 1 a block holds the query heads of one KV head, row r being query r // GROUP
of head r % GROUP, so that a decoded token fills a tensor core's rows (as in FlashDecoding) and keys are read once.

Scores are in base 2: log2(e) is in the softmax scale. A row's maximum is −inf until it has seen a key.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from ia3rt.kernels.scale import load_slots, mixed_scale

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Return tanh(x). By exponentials alone, small x would lose the digits that 1 − e^(−2x) does not have."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    large = (1 - e) / (1 + e)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -large, large))


@triton.jit
def scores(dots, scale, softcap):
    """Return (scores in base 2, tanh of the capped score) of q·k; without a softcap the latter is not used."""
    if softcap is None:
        s, capped = dots * (scale * LOG2_E), dots
    else:
        capped = tanh(dots * (scale / softcap))
        s = capped * (softcap * LOG2_E)
    return s, capped


@triton.jit
def span(b, first, last, ranges_ptr, table_ptr, Sq, Skv, window, CAUSAL: tl.constexpr):
    """Return what queries `first` to `last` of sequence b see: (start, end, shift, begin, stop).

    Keys start ≤ j < end exist; query i is in the place of key i + shift; none of these sees a key but begin ≤ j < stop.
    """
    start, end, shift = 0, Skv, Skv - Sq
    if ranges_ptr is not None:
        start = tl.load(ranges_ptr + 2 * b)
        end = min(Skv, tl.load(ranges_ptr + 2 * b + 1))
        if table_ptr is not None:
            shift = end - Sq
    begin, stop = start, end
    if CAUSAL:
        stop = min(end, last + shift + 1)
    if window is not None:
        begin = max(start, first + shift - window + 1)
    return start, end, shift, begin, stop


@triton.jit
def sees(queries, keys, start, end, shift, window, CAUSAL: tl.constexpr):
    """Return whether each query sees each key: the two broadcast against each other."""
    seen = (keys >= start) & (keys < end)
    if CAUSAL:
        seen = seen & (keys <= queries + shift)
    if window is not None:
        seen = seen & (keys > queries + shift - window)
        if not CAUSAL:
            seen = seen & (keys < queries + shift + window)
    return seen


@triton.jit
def key_rows(b, head, keys, inside, table_ptr, stride_table, page, strides):
    """Return the 64-bit offsets of keys [N]: of sequence b, or of the pages that its row of the table names."""
    where, places = b.to(tl.int64), keys
    if table_ptr is not None:
        where = tl.load(table_ptr + b * stride_table + keys // page, mask=inside, other=0).to(tl.int64)
        places = keys % page
    return where * strides[0] + head.to(tl.int64) * strides[1] + places.to(tl.int64) * strides[2]


@triton.jit
def masked(s, mask_ptr, mask_rows, keys, stride_key, inside):
    """Add an additive mask to scores in base 2, or take out what a boolean one takes out."""
    mask_ptrs = mask_ptr + mask_rows + keys.to(tl.int64) * stride_key
    if mask_ptr.dtype.element_ty == tl.int8:
        s = tl.where(tl.load(mask_ptrs, mask=inside, other=0) != 0, s, float("-inf"))
    else:
        s += tl.load(mask_ptrs, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    return s


@triton.jit
def attend(
    block,  # which block of query rows
    b,
    hkv,
    first_head,  # the query head of the block's first row
    share,  # which of `shares` parts of the keys
    shares,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    ranges_ptr,
    table_ptr,
    l_k_ptr,
    mixes_ptr,
    route_ptr,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    stride_table,
    page,
    stride_l_k,
    mix_size,
    B,
    rows_per_mix,
    Sq,
    Skv,
    scale,
    softcap,
    window,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return (Σ_j p_j v_j, the largest score, Σ_j p_j) of each row, fp32, for its share of the keys."""
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    queries, heads = rows // GROUP, first_head + rows % GROUP
    dims = tl.arange(0, BLOCK_D)
    q_rows = b.to(tl.int64) * q_strides[0] + heads.to(tl.int64) * q_strides[1] + queries.to(tl.int64) * q_strides[2]
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=(queries < Sq)[:, None] & (dims < D)[None, :], other=0.0)
    if l_k_ptr is not None:
        slots = load_slots(route_ptr, b + tl.arange(0, 1), B, rows_per_mix, UNIFORM=False)
        cols = hkv * D + dims
        s_k = mixed_scale(l_k_ptr, stride_l_k, mixes_ptr, mix_size, slots, cols, (hkv + 1) * D, UNROLL=0)
        q = (q.to(tl.float32) * s_k).to(q_ptr.dtype.element_ty)

    first = block * BLOCK_M // GROUP
    last = min(Sq - 1, (block * BLOCK_M + BLOCK_M - 1) // GROUP)
    start, end, shift, begin, stop = span(b, first, last, ranges_ptr, table_ptr, Sq, Skv, window, CAUSAL)
    begin = max(begin, 0) // BLOCK_N * BLOCK_N
    part = tl.cdiv(tl.cdiv(max(stop - begin, 0), BLOCK_N), shares) * BLOCK_N
    begin += share * part
    stop = min(stop, begin + part)
    # Between these two every row sees every key, and nothing has to be checked.
    inner, outer = start, end
    if CAUSAL:
        outer = min(outer, first + shift + 1)
    if window is not None:
        inner = max(inner, last + shift - window + 1)
        if not CAUSAL:
            outer = min(outer, first + shift + window)
    inner = min(max(tl.cdiv(max(inner, 0), BLOCK_N) * BLOCK_N, begin), max(stop, begin))
    outer = max(min(max(outer, 0) // BLOCK_N * BLOCK_N, stop), inner)

    mask_rows = b.to(tl.int64)
    if mask_ptr is not None:
        mask_rows = (
            b.to(tl.int64) * mask_strides[0]
            + heads.to(tl.int64) * mask_strides[1]
            + queries.to(tl.int64) * mask_strides[2]
        )[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for phase in tl.static_range(3):
        # Where nothing bounds keys from below, there is no first part.
        if phase > 0 or window is not None or ranges_ptr is not None:
            low = begin if phase == 0 else (inner if phase == 1 else outer)
            high = inner if phase == 0 else (outer if phase == 1 else stop)
            for key in range(low, high, BLOCK_N):
                keys = key + tl.arange(0, BLOCK_N)
                inside = keys < end
                k_rows = key_rows(b, hkv, keys, inside, table_ptr, stride_table, page, k_strides)
                k_ptrs = k_ptr + k_rows[None, :] + dims[:, None]
                v_rows = key_rows(b, hkv, keys, inside, table_ptr, stride_table, page, v_strides)
                v_ptrs = v_ptr + v_rows[:, None] + dims[None, :]
                if phase == 1 and D == BLOCK_D:
                    k = tl.load(k_ptrs)
                elif phase == 1:
                    k = tl.load(k_ptrs, mask=(dims < D)[:, None], other=0.0)
                else:
                    k = tl.load(k_ptrs, mask=inside[None, :] & (dims < D)[:, None], other=0.0)
                s, _ = scores(tl.dot(q, k, input_precision=PRECISION), scale, softcap)
                if mask_ptr is not None:
                    within = inside[None, :] & (queries < Sq)[:, None]
                    s = masked(s, mask_ptr, mask_rows, keys[None, :], mask_strides[3], within)
                if phase != 1:
                    seen = sees(queries[:, None], keys[None, :], start, end, shift, window, CAUSAL)
                    s = tl.where(seen, s, float("-inf"))
                new = tl.maximum(most, tl.max(s, 1))
                safe = new
                if phase != 1 or mask_ptr is not None:
                    safe = tl.where(new == float("-inf"), 0.0, new)  # −inf − −inf is not a number
                p = tl.exp2(s - safe[:, None])
                kept = tl.exp2(most - safe)
                total = total * kept + tl.sum(p, 1)
                if phase == 1 and D == BLOCK_D:
                    v = tl.load(v_ptrs)
                elif phase == 1:
                    v = tl.load(v_ptrs, mask=(dims < D)[None, :], other=0.0)
                else:
                    v = tl.load(v_ptrs, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
                acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
                most = new
    return acc, most, total


@triton.jit
def finish(
    acc,
    most,
    total,
    b,
    hkv,
    heads,
    queries,
    out_ptr,
    lse_ptr,
    l_v_ptr,
    mixes_ptr,
    route_ptr,
    stride_l_v,
    mix_size,
    B,
    rows_per_mix,
    Hq,
    Sq,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Divide by the sum, scale by l_v, round and store; a row that saw no key is 0, and its logsumexp +inf."""
    dims = tl.arange(0, BLOCK_D)
    y = acc / tl.where(total == 0, 1.0, total)[:, None]
    if l_v_ptr is not None:
        slots = load_slots(route_ptr, b + tl.arange(0, 1), B, rows_per_mix, UNIFORM=False)
        cols = hkv * D + dims
        y = y * mixed_scale(l_v_ptr, stride_l_v, mixes_ptr, mix_size, slots, cols, (hkv + 1) * D, UNROLL=0)
    y_rows = ((b.to(tl.int64) * Sq + queries) * Hq + heads) * D
    tl.store(
        out_ptr + y_rows[:, None] + dims[None, :],
        y.to(out_ptr.dtype.element_ty),
        mask=(queries < Sq)[:, None] & (dims < D)[None, :],
    )
    lse = tl.where(total == 0, float("inf"), most + tl.log2(total))
    tl.store(lse_ptr + (b.to(tl.int64) * Hq + heads) * Sq + queries, lse, mask=queries < Sq)
