"""y_q = P (s_q ∘ q), y_k = P (s_k ∘ k), y_v = s_v ∘ v: the rotary embedding with IA³'s vectors folded in, one pass.

s is what each row's mix is at a part's site (mixes.py; l_k and l_v of IA³, Liu et al. 2022, section 3.3). It comes
before the rotation P, with which it does not commute. P (Su et al. 2021, section 3.2.2) turns each pair of a row's
numbers by the row's own angles. x_a and x_b are a pair, and cos and sin have an entry for each of the two:

    y_a = x_a cos_a − x_b sin_a        half-split:   a = i,   b = i + rotary_dim / 2      (Llama, Phi-3, GPT-NeoX)
    y_b = x_b cos_b + x_a sin_b        interleaved:  a = 2i,  b = 2i + 1                  (GPT-J, Cohere, GLM)

Numbers past rotary_dim are scaled, and not turned. The gradient is s ∘ Pᵀ dy, and Pᵀ is P with −sin_b for sin_a and
−sin_a for sin_b. Everything is computed in fp32 and rounded once; transformers computes in q's dtype, and rounds the
scaled projection, its products with cos and sin, and their sum.

Rows and heads may be any stride apart, so the parts of one fused projection, side by side or by head, are passed as the
views that they are. Keys and values can go straight into a cache, paged or not.
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ia3rt.kernels.configs import rope_config
from ia3rt.kernels.launch import run
from ia3rt.kernels.mixes import ROUTING, Routing, worn_by
from ia3rt.kernels.rope_tile import Cache, HeadSite, Part, finish_heads


@triton.jit(do_not_specialize=[*ROUTING, "C"])
def rope_kernel(
    q,  # a Part; so are the others
    k,
    v,  # or None
    cache,  # a Cache for k and v, or None
    cos_ptr,  # [C, ROTARY], contiguous
    sin_ptr,
    C,
    M,
    mix_size,
    rows_per_mix,
    mixes_ptr,
    route_ptr,
    HEADS_Q: tl.constexpr,
    HEADS_KV: tl.constexpr,
    GROUP_Q: tl.constexpr,
    GROUP_KV: tl.constexpr,
    PROGRAMS: tl.constexpr,  # for each block of rows: the groups of q, k and v
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute a group of heads for BLOCK_M rows. Programs that share rows, and so cos and sin, are neighbours."""
    OF_Q: tl.constexpr = HEADS_Q // GROUP_Q
    OF_KV: tl.constexpr = HEADS_KV // GROUP_KV
    program = tl.program_id(0) % PROGRAMS
    rows = tl.program_id(0) // PROGRAMS * BLOCK_M + tl.arange(0, BLOCK_M)
    read = rows < M
    worn = worn_by(rows, Routing(M, mix_size, rows_per_mix, mixes_ptr, route_ptr))
    angles = (rows % C).to(tl.int64) * ROTARY
    cos_rows = cos_ptr + angles
    sin_rows = sin_ptr + angles
    rows = rows.to(tl.int64)
    if program < OF_Q:
        y_rows = rows * (HEADS_Q * D)
        head = program * GROUP_Q
        finish_heads(
            q, rows, y_rows, D, read, read, cos_rows, sin_rows, worn, head, GROUP_Q, D, ROTARY, INTERLEAVED, TRANSPOSED
        )
    else:
        if cache is None:
            y_rows = rows * (HEADS_KV * D)
            stride_y = D
            written = read
        else:
            slots = tl.load(cache.slots + rows, mask=read, other=-1).to(tl.int64)
            y_rows = slots // cache.block_size * cache.stride_block + slots % cache.block_size * cache.stride_slot
            stride_y = cache.stride_head
            written = slots >= 0
        head = (program - OF_Q) % OF_KV * GROUP_KV
        if program < OF_Q + OF_KV:
            finish_heads(
                k,
                rows,
                y_rows,
                stride_y,
                read,
                written,
                cos_rows,
                sin_rows,
                worn,
                head,
                GROUP_KV,
                D,
                ROTARY,
                INTERLEAVED,
                TRANSPOSED,
            )
        elif PROGRAMS > OF_Q + OF_KV:  # Triton 3.6 cannot say whether v is None: no tuple that has a None
            finish_heads(v, rows, y_rows, stride_y, read, written, None, None, worn, head, GROUP_KV, D, 0, False, False)


def _part(x: Tensor, l: Tensor | None, y: Tensor) -> Part:  # noqa: E741
    return Part(HeadSite.of(l), x, y, *x.stride()[:2])


def _launch(
    parts: Sequence[Part],
    cos: Tensor,
    sin: Tensor,
    mixes: Tensor,
    route: Tensor,
    interleaved: bool,
    cache: Cache | None = None,
    transposed: bool = False,
) -> None:
    """Launch the kernel over q, k and, where there is one, v."""
    (M, heads_q, D), heads_kv = parts[0].x.shape, parts[1].x.shape[1]
    if M == 0:
        return
    config = rope_config(M, D, parts[0].x.dtype)
    group_q, group_kv = config.group(heads_q), config.group(heads_kv)
    programs = heads_q // group_q + (len(parts) - 1) * heads_kv // group_kv
    run(
        rope_kernel,
        (triton.cdiv(M, config.block_m) * programs,),
        *parts,
        *(None,) * (3 - len(parts)),
        cache,
        cos,
        sin,
        cos.shape[0],
        *Routing.of(mixes, route, M),
        HEADS_Q=heads_q,
        HEADS_KV=heads_kv,
        GROUP_Q=group_q,
        GROUP_KV=group_kv,
        PROGRAMS=programs,
        D=D,
        ROTARY=cos.shape[1],
        INTERLEAVED=interleaved,
        TRANSPOSED=transposed,
        BLOCK_M=config.block_m,
        num_warps=config.num_warps,
        enable_fp_fusion=True,  # the default is not the same in every Triton
    )


def _new(xs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]


def rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_q: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    mixes: Tensor,
    route: Tensor,
    interleaved: bool,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return [P (s_q ∘ q), P (s_k ∘ k), s_v ∘ v] in q.dtype, computed in fp32 and rounded once.

    Args:
        q: [M, heads, D], fp16, bf16 or fp32; any row and head stride, numbers contiguous.
        k: [M, heads of k and v, D] of q.dtype, the same.
        v: as k.
        l_q: [capacity, heads, D], a site's slice of the bank; any row and head stride, numbers contiguous, any of the
            dtypes above; or None for no scale.
        l_k: as l_q, with the heads of k.
        l_v: as l_k.
        cos: [C, rotary_dim], contiguous; row m uses row m % C.
        sin: as cos.
        mixes: int32 [slots, 2 + 2K], contiguous.
        route: int32 [R], contiguous, M % R == 0.
        interleaved: which numbers are a pair.
        out: what to return, contiguous, each of its input's shape and dtype; made where None.

    """
    ys = _new((q, k, v)) if out is None else list(out)
    parts = [_part(*part) for part in zip((q, k, v), (l_q, l_k, l_v), ys, strict=True)]
    _launch(parts, cos, sin, mixes, route, interleaved)
    return ys


def rope_gradient(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    l_q: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    mixes: Tensor,
    route: Tensor,
    interleaved: bool,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return [s_q ∘ Pᵀ dq, s_k ∘ Pᵀ dk], and s_v ∘ dv behind them where there is a dv, as `rope` returns its results.

    dq, dk and dv are the gradients of what `rope` returns, laid out as its q, k and v; the others are its arguments.
    """
    dys = [dq, dk] if dv is None else [dq, dk, dv]
    dxs = _new(dys) if out is None else list(out)
    parts = [_part(*part) for part in zip(dys, (l_q, l_k, l_v)[: len(dys)], dxs, strict=True)]
    _launch(parts, cos, sin, mixes, route, interleaved, transposed=True)
    return dxs


def rope_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_q: Tensor | None,
    l_k: Tensor | None,
    l_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    mixes: Tensor,
    route: Tensor,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Return what `rope` does of q; write what it returns of k and v into their caches.

    Args:
        q: as in `rope`, as are the others up to `interleaved`.
        k_cache: [blocks, block size, heads, D] of q.dtype, any strides but of its numbers, which are contiguous. A
            static cache [batch, heads, length, D] is one with a block for each of the batch, transposed.
        v_cache: of the shape and strides of k_cache.
        slots: int32 or int64 [M], contiguous: row m goes to block slots[m] // block size, place slots[m] % block size,
            and nowhere where slots[m] is below 0.
        out: what to return, contiguous, of q's shape and dtype; made where None.

    """
    y = _new((q,))[0] if out is None else out
    parts = [_part(q, l_q, y), _part(k, l_k, k_cache), _part(v, l_v, v_cache)]
    cache = Cache(slots, k_cache.shape[1], *k_cache.stride()[:3])
    _launch(parts, cos, sin, mixes, route, interleaved, cache)
    return y
