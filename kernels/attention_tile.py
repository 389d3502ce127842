"""What the attention kernels share: scores, who sees whom, and the loop over the keys of a block of query rows.

A row is a query of one head. With GROUP > 1 a block holds the query heads of one KV head, row r being query r // GROUP
of head r % GROUP, so that a decoded token fills a tensor core's rows (as in FlashDecoding) and keys are read once.

Scores are in base 2: log2(e) is in the softmax scale. A row's maximum is −inf until it has seen a key.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from ia3rt.kernels.attention_inputs import LOG2_E, key_rows, masked, rows_of
from ia3rt.kernels.mixes import mixed_scale, worn_by


@triton.jit
def tanh(x):
    """Return tanh(x). By exponentials alone, small x would lose the digits that 1 − e^(−2x) does not have."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    large = (1 - e) / (1 + e)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -large, large))


@triton.jit
def scores(dots, inputs):
    """Return (scores in base 2, tanh of the capped score) of q·k; without a softcap the latter is not used."""
    if inputs.softcap is None:
        s, capped = dots * (inputs.scale * LOG2_E), dots
    else:
        capped = tanh(dots * (inputs.scale / inputs.softcap))
        s = capped * (inputs.softcap * LOG2_E)
    return s, capped


@triton.jit
def span(b, first, last, inputs, Sq, Skv, window, CAUSAL: tl.constexpr):
    """Return what queries `first` to `last` of sequence b see: (start, end, shift, begin, stop).

    Keys start ≤ j < end exist; query i is in the place of key i + shift; none of these sees a key but begin ≤ j < stop.
    """
    start, end, shift = 0, Skv, Skv - Sq
    if inputs.ranges is not None:
        start = tl.load(inputs.ranges + 2 * b)
        end = min(Skv, tl.load(inputs.ranges + 2 * b + 1))
        if inputs.table is not None:
            shift = end - Sq
    begin, stop = start, end
    if CAUSAL:
        stop = min(end, last + shift + 1)
    if window is not None:
        begin = max(start, first + shift - window + 1)
        if not CAUSAL:
            stop = min(end, last + shift + window)
    return start, end, shift, begin, stop


@triton.jit
def exist(keys, start, end, inputs):
    """Return which keys there are. Others are not read: padding may hold NaN, and so would be 0 times it."""
    there = keys < end
    if inputs.ranges is not None:
        there = there & (keys >= start)
    return there


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
def attend(
    block,  # which block of query rows
    b,
    hkv,
    first_head,  # the query head of the block's first row
    share,  # which of `shares` parts of the keys
    shares,
    inputs,
    stride_table,
    site_k,
    routing,
    Sq,
    Skv,
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
    q_rows = rows_of(b, heads, queries, inputs.q_strides)
    there = (queries < Sq)[:, None] & (dims < D)[None, :]
    q = tl.load(inputs.q + q_rows[:, None] + dims[None, :], mask=there, other=0.0)
    if site_k.l is not None:
        s_k = mixed_scale(site_k, worn_by(b + tl.arange(0, 1), routing), hkv * D + dims, (hkv + 1) * D)
        q = (q.to(tl.float32) * s_k).to(inputs.q.dtype.element_ty)

    first = block * BLOCK_M // GROUP
    last = min(Sq - 1, (block * BLOCK_M + BLOCK_M - 1) // GROUP)
    start, end, shift, begin, stop = span(b, first, last, inputs, Sq, Skv, window, CAUSAL)
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
    if inputs.mask is not None:
        mask_rows = rows_of(b, heads, queries, inputs.mask_strides)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for phase in tl.static_range(3):
        # Where nothing bounds keys from below, there is no first part.
        if phase > 0 or window is not None or inputs.ranges is not None:
            low = begin if phase == 0 else (inner if phase == 1 else outer)
            high = inner if phase == 0 else (outer if phase == 1 else stop)
            for key in range(low, high, BLOCK_N):
                keys = key + tl.arange(0, BLOCK_N)
                inside = exist(keys, start, end, inputs)
                k_rows = key_rows(b, hkv, keys, inside, inputs, stride_table, inputs.k_strides)
                k_ptrs = inputs.k + k_rows[None, :] + dims[:, None]
                v_rows = key_rows(b, hkv, keys, inside, inputs, stride_table, inputs.v_strides)
                v_ptrs = inputs.v + v_rows[:, None] + dims[None, :]
                if phase == 1 and D == BLOCK_D:
                    k = tl.load(k_ptrs)
                elif phase == 1:
                    k = tl.load(k_ptrs, mask=(dims < D)[:, None], other=0.0)
                else:
                    k = tl.load(k_ptrs, mask=inside[None, :] & (dims < D)[:, None], other=0.0)
                s, _ = scores(tl.dot(q, k, input_precision=PRECISION), inputs)
                if inputs.mask is not None:
                    within = inside[None, :] & (queries < Sq)[:, None]
                    s = masked(s, inputs, mask_rows, keys[None, :], within)
                if phase != 1:
                    seen = sees(queries[:, None], keys[None, :], start, end, shift, window, CAUSAL)
                    s = tl.where(seen, s, float("-inf"))
                new = tl.maximum(most, tl.max(s, 1))
                safe = new
                if phase != 1 or inputs.mask is not None:
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
    site_v,
    routing,
    Hq,
    Sq,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Divide by the sum, scale by s_v, round and store; a row that saw no key is 0, and its logsumexp +inf."""
    dims = tl.arange(0, BLOCK_D)
    y = acc / tl.where(total == 0, 1.0, total)[:, None]
    if site_v.l is not None:
        worn = worn_by(b + tl.arange(0, 1), routing)
        y = y * mixed_scale(site_v, worn, hkv * D + dims, (hkv + 1) * D)
    y_rows = ((b.to(tl.int64) * Sq + queries) * Hq + heads) * D
    tl.store(
        out_ptr + y_rows[:, None] + dims[None, :],
        y.to(out_ptr.dtype.element_ty),
        mask=(queries < Sq)[:, None] & (dims < D)[None, :],
    )
    lse = tl.where(total == 0, float("inf"), most + tl.log2(total))
    tl.store(lse_ptr + (b.to(tl.int64) * Hq + heads) * Sq + queries, lse, mask=queries < Sq)
