"""o = s_v ∘ softmax(mask(softcap(scale · (s_k ∘ q) kᵀ))) v: flash attention, scaled by IA³'s vectors.

This is Dao 2023, "FlashAttention-2", with IA³ (Liu et al. 2022, section 3.3) folded in. Values scaled by l give
P (V ∘ l) = (P V) ∘ l, so s_v costs one multiply in the epilogue. Keys scaled by l give q (k ∘ l)ᵀ = (q ∘ l) kᵀ, so s_k
goes into q; that is right only where no rotary embedding comes between the projection and this. s_k ∘ q is rounded to
q's dtype, for the tensor cores. Scores, sums and s_v are fp32; p is rounded to v's dtype and o once.

On sm_90 the products are wgmma's. q and k are read from shared memory; p, which was just computed, is in registers.
Blocks of keys that every row sees are not masked: only the diagonal, and the ends of a window or of a padded range.

Few query rows go to attention_decode.py, which shares the keys of a sequence among several programs.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.attention_configs import attention_config, padded
from ia3rt.kernels.attention_decode import decode, splits_of
from ia3rt.kernels.attention_inputs import Inputs
from ia3rt.kernels.attention_tile import attend, finish
from ia3rt.kernels.configs import arch_of, card_of, processors_of
from ia3rt.kernels.launch import precision_of, run
from ia3rt.kernels.mixes import ROUTING, Routing, Site
from ia3rt.kernels.tuned import AttentionConfig


@triton.jit(do_not_specialize=[*ROUTING, "stride_table", "Sq", "Skv", "window"])
def attention_kernel(
    out_ptr,  # [B, Sq, Hq, D], contiguous
    lse_ptr,  # fp32 [B, Hq, Sq], contiguous
    site_k,  # of width Hkv * D
    site_v,  # the same
    inputs,
    stride_table,  # or None
    window,  # or None
    Hq,
    Sq,
    Skv,
    M,  # the sequences, B
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of a KV head
    GROUP: tl.constexpr,  # and how many of them a block of rows holds: 1 or all
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute one block of rows. Under a causal mask the last blocks have most to do, and go first."""
    routing = Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr)
    blocks, groups = tl.cdiv(Sq * GROUP, BLOCK_M), Hq // GROUP
    block, place = blocks - 1 - tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, first_head = place // groups, place % groups * GROUP
    hkv = first_head // HEADS
    acc, most, total = attend(
        block,
        b,
        hkv,
        first_head,
        0,
        1,
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
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    heads, queries = first_head + rows % GROUP, rows // GROUP
    finish(acc, most, total, b, hkv, heads, queries, out_ptr, lse_ptr, site_v, routing, Hq, Sq, D, BLOCK_D)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    table: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    mixes: Tensor,
    route: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    out: tuple[Tensor, Tensor] | None = None,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return o [B, Sq, Hq, D] in q.dtype and each row's logsumexp in base 2, fp32 [B, Hq, Sq].

    Args:
        q: [B, Hq, Sq, D], fp16, bf16 or fp32; any strides but for a contiguous last dimension, as k and v.
        k: [B, Hkv, Skv, D] of q.dtype, Hq % Hkv == 0; or, with a table, [pages, Hkv, page, D].
        v: as k.
        mask: [B, Hq, Sq, Skv], any strides (0 broadcasts): bool, True where a query sees a key, or added to scores.
        ranges: int32 [B, 2], contiguous: the keys (from, to) that each sequence has, which is padded on either side.
        table: int32 [B, max pages], contiguous: a sequence's pages; then `ranges` says how many keys it has.
        l_k: [capacity, Hkv * D], a site's slice of the bank, columns contiguous; or None.
        l_v: the same.
        mixes: int32 [slots, 2 + 2K], contiguous.
        route: int32 [R], contiguous, B % R == 0: sequence b wears mix route[b // (B // R)].
        scale: what q·k is multiplied by.
        causal: whether query i sees only keys up to i + n − Sq, where n is Skv; with a table, the sequence's length.
        window: how many keys back a query sees, itself included; not causal, as many ahead too. None for all.
        softcap: scores become softcap · tanh(score / softcap); None for no cap.
        out: both results, contiguous; made where None.
        config: block sizes; chosen by shape and device where None.

    """
    B, Hq, Sq, D = q.shape
    Hkv = k.shape[1]
    Skv = k.shape[2] if table is None else table.shape[1] * k.shape[2]
    o, lse = out or (q.new_empty(B, Sq, Hq, D), q.new_empty((B, Hq, Sq), dtype=torch.float32))
    if o.numel() == 0:
        return o, lse
    heads = Hq // Hkv
    packs = Sq * heads <= 64
    rows = Sq * heads if packs else Sq
    group = heads if packs else 1
    config = config or attention_config(
        rows,
        D,
        q.dtype,
        arch_of(q.device),
        processors_of(q.device),
        heads=B * Hq // group,
        masked=mask is not None,
        plain=mask is None and ranges is None and table is None and window is None and softcap is None,
        card=card_of(q.device),
    )
    grid = (triton.cdiv(Sq * group, config.block_m), B * Hq // group)
    inputs = Inputs.of(q, k, v, mask, ranges, table, scale, softcap)
    # As if the mixes were several where there is one: a load, but not another kernel for it to be built.
    routing = Routing.of(mixes, route, B)._replace(rows_per_mix=B // route.numel())
    sizes = None if table is None else table.stride(0), window, Hq, Sq, Skv
    sites, read = (Site.of(l_k), Site.of(l_v)), (inputs, *sizes, *routing)
    constants = dict(
        CAUSAL=causal,
        D=D,
        PRECISION=precision_of(q.dtype),
        HEADS=heads,
        GROUP=group,
        BLOCK_D=padded(D),
        enable_fp_fusion=True,  # the default is not the same in every Triton
        **config.build_options(),
    )
    splits = splits_of(grid[0] * grid[1], Skv, config.block_n, q.device) if packs else 1
    if splits > 1:
        decode(o, lse, splits, grid, sites, read, routing, constants)
    else:
        # Along one axis: CUDA has 65,535 programs along another.
        run(attention_kernel, (grid[0] * grid[1],), o, lse, *sites, *read, **constants)
    return o, lse
