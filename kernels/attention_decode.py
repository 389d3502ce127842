"""Attention of few query rows: several programs share the keys of a sequence (FlashDecoding, Dao et al. 2023).

    o = Σ_i 2^(m_i − m) a_i / Σ_i 2^(m_i − m) t_i        m = max_i m_i

over the programs i, each with its largest score m_i, t_i = Σ_j p_j and a_i = Σ_j p_j v_j. They go to a workspace, and
a second kernel combines them in their order, so that results repeat to the bit. Then it scales by s_v.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.attention_tile import attend, finish
from ia3rt.kernels.configs import processors_of
from ia3rt.kernels.launch import run
from ia3rt.kernels.mixes import ROUTING, Routing, Site


@triton.jit(do_not_specialize=[*ROUTING, "stride_table", "Sq", "Skv", "window"])
def decode_kernel(
    sums_ptr,  # fp32 [splits, B, Hq, Sq, D]
    ends_ptr,  # fp32 [2, splits, B, Hq, Sq]: the largest score, and Σ p
    site_k,  # and the rest as attention_kernel
    inputs,
    stride_table,
    window,
    Hq,
    Sq,
    Skv,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute what one share of the keys adds to one block of rows."""
    routing = Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr)
    groups = Hq // GROUP
    b, first_head = tl.program_id(1) // groups, tl.program_id(1) % groups * GROUP
    share, shares = tl.program_id(2), tl.num_programs(2)
    acc, most, total = attend(
        tl.program_id(0),
        b,
        first_head // HEADS,
        first_head,
        share,
        shares,
        inputs,
        stride_table,
        site_k,
        routing,
        Sq,
        Skv,
        window,
        CAUSAL,
        D,
        PRECISION,
        GROUP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    queries, dims = rows // GROUP, tl.arange(0, BLOCK_D)
    of_row = ((share * M + b).to(tl.int64) * Hq + first_head + rows % GROUP) * Sq + queries
    mask = (queries < Sq)[:, None] & (dims < D)[None, :]
    tl.store(sums_ptr + of_row[:, None] * D + dims[None, :], acc, mask=mask)
    tl.store(ends_ptr + of_row, most, mask=queries < Sq)
    tl.store(ends_ptr + shares.to(tl.int64) * M * Hq * Sq + of_row, total, mask=queries < Sq)


@triton.jit(do_not_specialize=[*ROUTING, "Sq", "splits"])
def combine_kernel(
    out_ptr,
    lse_ptr,
    sums_ptr,
    ends_ptr,
    site_v,
    splits,
    Hq,
    Sq,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Combine the shares of one row."""
    routing = Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr)
    query, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dims = tl.arange(0, BLOCK_D)
    size = M.to(tl.int64) * Hq * Sq
    row = (b.to(tl.int64) * Hq + head) * Sq + query + tl.arange(0, 1)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    most = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for split in range(splits):
        at = split * size + row
        its_most = tl.load(ends_ptr + at)
        its_total = tl.load(ends_ptr + splits * size + at)
        its_sum = tl.load(sums_ptr + at[:, None] * D + dims[None, :], mask=(dims < D)[None, :], other=0.0)
        new = tl.maximum(most, its_most)
        safe = tl.where(new == float("-inf"), 0.0, new)
        kept, added = tl.exp2(most - safe), tl.exp2(its_most - safe)
        acc = acc * kept[:, None] + its_sum * added[:, None]
        total = total * kept + its_total * added
        most = new
    heads, queries = head + tl.arange(0, 1), query + tl.arange(0, 1)
    finish(acc, most, total, b, head // HEADS, heads, queries, out_ptr, lse_ptr, site_v, routing, Hq, Sq, D, BLOCK_D)


def splits_of(programs: int, Skv: int, block_n: int, device: torch.device) -> int:
    """Return how many programs share the keys of each block of rows, so that there are enough for the device.

    Each has at least four blocks of keys. It depends on the room for keys, not on their number, which is on the device.
    """
    wanted: int = processors_of(device) // programs
    return max(1, min(wanted, Skv // (4 * block_n)))


def decode(
    o: Tensor,
    lse: Tensor,
    splits: int,
    grid: tuple[int, int],
    sites: tuple[Site, Site],
    read: tuple[Any, ...],
    routing: Routing,
    constants: dict[str, Any],
) -> None:
    """Write o and lse; `sites` and `read` are what attention_kernel would be launched with."""
    site_k, site_v = sites
    B, Sq, Hq, D = o.shape
    sums = o.new_empty((splits, B, Hq, Sq, D), dtype=torch.float32)
    ends = o.new_empty((2, splits, B, Hq, Sq), dtype=torch.float32)
    run(decode_kernel, (*grid, splits), sums, ends, site_k, *read, **constants)
    run(
        combine_kernel,
        (Sq, Hq, B),
        o,
        lse,
        sums,
        ends,
        site_v,
        splits,
        Hq,
        Sq,
        *routing,
        D=D,
        HEADS=constants["HEADS"],
        BLOCK_D=constants["BLOCK_D"],
        num_warps=1 if D <= 64 else 4,
        enable_fp_fusion=True,
    )
