"""The launches of attention, and of its gradient: transformers' transposed views, and pages of a cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ia3rt.bench.compiled.case import Case, empty, routing, site
from ia3rt.kernels.attention import attention
from ia3rt.kernels.attention_gradient import attention_gradient


def _attention(
    B: int,
    Sq: int,
    Skv: int,
    has_scale: bool,
    *,
    Hq: int = 32,
    Hkv: int = 8,
    D: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    masked: bool = False,
    padded: bool = False,
    page: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    gradient: bool = False,
) -> None:
    """Launch attention, or its gradient, for B sequences, each of which wears another mix."""
    q = empty(B, Sq, Hq, D, dtype=dtype).transpose(1, 2)
    pages = B * Skv // page if page else 0
    kv = empty(pages or B, page or Skv, Hkv, D, dtype=dtype).transpose(1, 2)
    mask = empty(B, 1, Sq, Skv, dtype=torch.bool).expand(B, Hq, Sq, Skv) if masked else None
    ranges = empty(B, 2, dtype=torch.int32) if padded or page else None
    table = empty(B, Skv // page, dtype=torch.int32) if page else None
    options = D**-0.5, causal, window, softcap
    if gradient:
        o, lse = empty(B, Sq, Hq, D, dtype=dtype), empty(B, Hq, Sq)
        attention_gradient(o, q, kv, kv, o, lse, mask, ranges, *options)
        return
    l_v = site(Hkv * D) if has_scale else None
    attention(q, kv, kv, mask, ranges, table, None, l_v, *routing(B), *options)


SMOL: dict[str, Any] = dict(Hq=9, Hkv=3, D=64)

CASES: dict[str, Case] = {
    "attention, prefill": Case(partial(_attention, 4, 2048, 2048), hgmma=True),
    "attention, prefill, 64 a head": Case(partial(_attention, 4, 2048, 2048, **SMOL), hgmma=True),
    "attention, prefill, 80 a head": Case(partial(_attention, 4, 2048, 2048, D=80), hgmma=True),
    "attention, prefill, 8 a head": Case(partial(_attention, 4, 2048, 2048, D=8)),
    "attention, prefill, 256 a head": Case(
        partial(_attention, 4, 2048, 2048, D=256, window=1024, softcap=50.0), hgmma=True
    ),
    "attention, prefill, masked": Case(partial(_attention, 4, 2048, 2048, masked=True, causal=False), hgmma=True),
    "attention, prefill, padded": Case(partial(_attention, 4, 2048, 2048, padded=True), hgmma=True),
    "attention, prefill, pages": Case(partial(_attention, 4, 512, 2048, page=16), hgmma=True),
    "attention, prefill, fp32": Case(partial(_attention, 4, 2048, 2048, dtype=torch.float32), matrix=False),
    "attention, decode": Case(partial(_attention, 4, 1, 4096, causal=False)),
    "attention, decode, 64 a head": Case(partial(_attention, 4, 1, 4096, causal=False, **SMOL)),
    "attention, decode, many sequences": Case(partial(_attention, 64, 1, 4096, causal=False)),
    "attention, decode, masked": Case(partial(_attention, 4, 1, 4096, causal=False, masked=True)),
    "attention, decode, pages": Case(partial(_attention, 4, 1, 4096, page=16)),
    "attention, decode, 256 a head": Case(partial(_attention, 4, 1, 4096, D=256, causal=False, softcap=50.0)),
    "attention, decode, fp32": Case(partial(_attention, 4, 1, 4096, causal=False, dtype=torch.float32), matrix=False),
    "attention gradient": Case(partial(_attention, 4, 2048, 2048, gradient=True), matrix=False),
    "attention gradient, 64 a head": Case(partial(_attention, 4, 2048, 2048, gradient=True, **SMOL), matrix=False),
    "attention gradient, 8 a head": Case(partial(_attention, 4, 2048, 2048, gradient=True, D=8), matrix=False),
    "attention gradient, 256 a head": Case(
        partial(_attention, 4, 2048, 2048, gradient=True, D=256, softcap=50.0), matrix=False
    ),
    "attention gradient, masked": Case(
        partial(_attention, 4, 2048, 2048, gradient=True, masked=True, causal=False), matrix=False
    ),
    "attention gradient, fp32": Case(
        partial(_attention, 4, 2048, 2048, gradient=True, dtype=torch.float32), matrix=False
    ),
}
