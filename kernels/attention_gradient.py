"""The gradient of attention (Dao 2023, "FlashAttention-2", section 3.1.2), given do for o = P v.

    P = 2^(s − lse)    dv = Pᵀ do    ds = P ∘ (do vᵀ − delta)    dq = scale · ds k    dk = scale · dsᵀ q

with delta = rowsum(do ∘ o), and ds further multiplied by 1 − (s / softcap)² where scores are capped. One kernel makes
delta, one dk and dv for a block of keys, and one dq for a block of queries. P is computed twice, and in return nothing
is added atomically: the query heads of a KV head are added up in their order.

IA³'s vectors are not seen here. With q' = s_k ∘ q these are the gradients of q', and with do' = s_v ∘ do those of
attention without s_v; the op multiplies and sums what is left.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.attention_configs import attention_gradient_configs, padded
from ia3rt.kernels.attention_inputs import Inputs, masked, rows_of
from ia3rt.kernels.attention_tile import exist, scores, sees, span
from ia3rt.kernels.configs import arch_of
from ia3rt.kernels.launch import precision_of, run


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    delta_ptr,  # fp32 [B, Hq, Sq]
    do_ptr,  # [B, Sq, Hq, D], contiguous
    o_ptr,
    rows,  # B * Sq * Hq
    Hq,
    Sq,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute delta of one block of rows, which are those of o."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    at = row[:, None] * D + dims[None, :]
    inside = (row < rows)[:, None] & (dims < D)[None, :]
    do = tl.load(do_ptr + at, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(o_ptr + at, mask=inside, other=0.0).to(tl.float32)
    head, token = row % Hq, row // Hq
    tl.store(delta_ptr + (token // Sq * Hq + head) * Sq + token % Sq, tl.sum(do * o, 1), mask=row < rows)


@triton.jit
def _plus(acc, a, b, PRECISION: tl.constexpr):
    """Return acc + a b. In fp32 the products of a block are summed apart: see linear_tile.add_part."""
    if a.dtype == tl.float32:
        acc += tl.dot(a, b, input_precision=PRECISION)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _probabilities(
    dots,
    dps,
    lse,
    delta,
    queries,
    keys,
    inputs,
    mask_rows,
    start,
    end,
    shift,
    Sq,
    window,
    CAUSAL: tl.constexpr,
):
    """Return (P, ds) of q·k and do·v; queries, lse and delta broadcast against keys."""
    s, capped = scores(dots, inputs)
    seen = sees(queries, keys, start, end, shift, window, CAUSAL) & (queries < Sq)
    if inputs.mask is not None:
        s = masked(s, inputs, mask_rows, keys, seen)
    p = tl.where(seen, tl.exp2(s - lse), 0.0)
    ds = p * (dps - delta)
    if inputs.softcap is not None:
        ds = ds * (1 - capped * capped)
    return p, ds


@triton.jit(do_not_specialize=["Sq", "Skv", "window"])
def key_gradient_kernel(
    dk_ptr,  # [B, Hkv, Skv, D], contiguous
    dv_ptr,
    do_ptr,  # [B, Sq, Hq, D], contiguous
    lse_ptr,
    delta_ptr,
    inputs,
    Hq,
    Sq,
    Skv,
    window,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dk and dv of one block of keys.

    In fp32 each query head is summed apart and added to what is stored: one sum over the queries of all heads errs by
    more than torch's, and a second pair of sums takes as many registers again.
    """
    Hkv = Hq // HEADS
    blocks = tl.cdiv(Skv, BLOCK_N)
    b, hkv = tl.program_id(0) // blocks, tl.program_id(1)
    first = tl.program_id(0) % blocks * BLOCK_N
    keys, dims = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    start, end, shift, _, _ = span(b, 0, 0, inputs, Sq, Skv, None, False)
    own = (keys < Skv)[:, None] & (dims < D)[None, :]
    wide_b = b.to(tl.int64)
    k_rows = rows_of(b, hkv, keys, inputs.k_strides)
    v_rows = rows_of(b, hkv, keys, inputs.v_strides)
    inside = exist(keys, start, end, inputs)[:, None] & (dims < D)[None, :]
    k = tl.load(inputs.k + k_rows[:, None] + dims[None, :], mask=inside, other=0.0)
    v = tl.load(inputs.v + v_rows[:, None] + dims[None, :], mask=inside, other=0.0)
    low, high = 0, Sq
    if CAUSAL:
        low = max(0, first - shift) // BLOCK_M * BLOCK_M
    if window is not None:
        high = min(Sq, first + BLOCK_N - 1 - shift + window)
        if not CAUSAL:
            low = max(0, first - shift - window + 1) // BLOCK_M * BLOCK_M
    is_parted: tl.constexpr = HEADS > 1 and do_ptr.dtype.element_ty == tl.float32
    at = ((wide_b * Hkv + hkv) * Skv + keys)[:, None] * D + dims[None, :]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(HEADS):
        head = hkv * HEADS + member
        for query in range(low, high, BLOCK_M):
            queries = query + tl.arange(0, BLOCK_M)
            there = (queries < Sq)[:, None] & (dims < D)[None, :]
            q_rows = rows_of(b, head, queries, inputs.q_strides)
            q = tl.load(inputs.q + q_rows[:, None] + dims[None, :], mask=there, other=0.0)
            do_rows = ((wide_b * Sq + queries) * Hq + head) * D
            do = tl.load(do_ptr + do_rows[:, None] + dims[None, :], mask=there, other=0.0)
            of_row = (wide_b * Hq + head) * Sq + queries
            lse = tl.load(lse_ptr + of_row, mask=queries < Sq, other=0.0)
            delta = tl.load(delta_ptr + of_row, mask=queries < Sq, other=0.0)
            mask_rows = wide_b
            if inputs.mask is not None:
                mask_rows = rows_of(b, head, queries, inputs.mask_strides)[None, :]
            p, ds = _probabilities(
                tl.dot(k, tl.trans(q), input_precision=PRECISION),
                tl.dot(v, tl.trans(do), input_precision=PRECISION),
                lse[None, :],
                delta[None, :],
                queries[None, :],
                keys[:, None],
                inputs,
                mask_rows,
                start,
                end,
                shift,
                Sq,
                window,
                CAUSAL,
            )
            dv = _plus(dv, p.to(do.dtype), do, PRECISION)
            dk = _plus(dk, ds.to(q.dtype), q, PRECISION)
        if is_parted:
            others = own & (member > 0)
            tl.store(dk_ptr + at, tl.load(dk_ptr + at, mask=others, other=0.0) + dk * inputs.scale, mask=own)
            tl.store(dv_ptr + at, tl.load(dv_ptr + at, mask=others, other=0.0) + dv, mask=own)
            tl.debug_barrier()  # the next head's sums are added to these, maybe by other threads
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if not is_parted:
        tl.store(dk_ptr + at, (dk * inputs.scale).to(dk_ptr.dtype.element_ty), mask=own)
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["Sq", "Skv", "window"])
def query_gradient_kernel(
    dq_ptr,  # [B, Hq, Sq, D], contiguous
    do_ptr,  # and the rest as key_gradient_kernel
    lse_ptr,
    delta_ptr,
    inputs,
    Hq,
    Sq,
    Skv,
    window,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dq of one block of queries. Under a causal mask the last blocks have most to do, and go first."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    place = tl.program_id(0) // blocks
    b, head = place // Hq, place % Hq
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    hkv = head // HEADS
    queries, dims = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    own = (queries < Sq)[:, None] & (dims < D)[None, :]
    wide_b = b.to(tl.int64)
    q_rows = rows_of(b, head, queries, inputs.q_strides)
    q = tl.load(inputs.q + q_rows[:, None] + dims[None, :], mask=own, other=0.0)
    do_rows = ((wide_b * Sq + queries) * Hq + head) * D
    do = tl.load(do_ptr + do_rows[:, None] + dims[None, :], mask=own, other=0.0)
    of_row = (wide_b * Hq + head) * Sq + queries
    lse = tl.load(lse_ptr + of_row, mask=queries < Sq, other=0.0)
    delta = tl.load(delta_ptr + of_row, mask=queries < Sq, other=0.0)
    mask_rows = wide_b
    if inputs.mask is not None:
        mask_rows = rows_of(b, head, queries, inputs.mask_strides)[:, None]
    last = min(Sq, first + BLOCK_M) - 1
    start, end, shift, begin, stop = span(b, first, last, inputs, Sq, Skv, window, CAUSAL)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in range(max(begin, 0) // BLOCK_N * BLOCK_N, stop, BLOCK_N):
        keys = key + tl.arange(0, BLOCK_N)
        there = exist(keys, start, end, inputs)[:, None] & (dims < D)[None, :]
        k_rows = rows_of(b, hkv, keys, inputs.k_strides)
        v_rows = rows_of(b, hkv, keys, inputs.v_strides)
        k = tl.load(inputs.k + k_rows[:, None] + dims[None, :], mask=there, other=0.0)
        v = tl.load(inputs.v + v_rows[:, None] + dims[None, :], mask=there, other=0.0)
        _, ds = _probabilities(
            tl.dot(q, tl.trans(k), input_precision=PRECISION),
            tl.dot(do, tl.trans(v), input_precision=PRECISION),
            lse[:, None],
            delta[:, None],
            queries[:, None],
            keys[None, :],
            inputs,
            mask_rows,
            start,
            end,
            shift,
            Sq,
            window,
            CAUSAL,
        )
        dq = _plus(dq, ds.to(k.dtype), k, PRECISION)
    rows = (place.to(tl.int64) * Sq + queries) * D
    tl.store(dq_ptr + rows[:, None] + dims[None, :], (dq * inputs.scale).to(dq_ptr.dtype.element_ty), mask=own)


def attention_gradient(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """Return [dq, dk, dv], shaped as q, k and v and contiguous.

    Args:
        do: [B, Sq, Hq, D] of q.dtype, contiguous.
        q: as attention's; with l_k, s_k ∘ q.
        k: [B, Hkv, Skv, D], as attention's.
        v: as k.
        o: attention's result, which no l_v scaled; or any o and do whose product is that one's.
        lse: attention's other result.
        mask: as attention's, and so on.
        ranges: as attention's.
        scale: as attention's.
        causal: as attention's.
        window: as attention's.
        softcap: as attention's.
        out: the three results, contiguous; made where None.

    """
    B, Hq, Sq, D = q.shape
    Hkv, Skv = k.shape[1:3]
    dq, dk, dv = out or [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    of_keys, of_queries = attention_gradient_configs(D, q.dtype, arch_of(q.device), masked=mask is not None)
    block_d = padded(D)
    delta = torch.empty_like(lse)
    rows = B * Sq * Hq
    run(
        delta_kernel,
        (triton.cdiv(rows, 16),),
        delta,
        do,
        o,
        rows,
        Hq,
        Sq,
        D=D,
        BLOCK_M=16,
        BLOCK_D=block_d,
        num_warps=4,
        enable_fp_fusion=True,
    )
    inputs = Inputs.of(q, k, v, mask, ranges, None, scale, softcap)
    shared = do, lse, delta, inputs, Hq, Sq, Skv, window
    constants = dict(
        CAUSAL=causal,
        D=D,
        PRECISION=precision_of(q.dtype),
        HEADS=Hq // Hkv,
        BLOCK_D=block_d,
        enable_fp_fusion=True,  # the default is not the same in every Triton
    )
    # CUDA has 65,535 programs along an axis but the first. What a head of a sequence reads, no other does.
    grid = (triton.cdiv(Skv, of_keys.block_n) * B, Hkv)
    run(key_gradient_kernel, grid, dk, dv, *shared, **constants, **of_keys.build_options())
    programs = triton.cdiv(Sq, of_queries.block_m) * B * Hq
    run(query_gradient_kernel, (programs,), dq, *shared, **constants, **of_queries.build_options())
    return [dq, dk, dv]
