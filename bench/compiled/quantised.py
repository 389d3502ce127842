"""The launches of linear layers whose weight is quantised."""

from __future__ import annotations

from functools import partial

import torch

from ia3rt.bench.compiled.case import Case, empty, routing, site
from ia3rt.kernels.linear_quantised import linear_quantised


def _quantised(
    kind: str,
    M: int,
    R: int,
    has_scale: bool,
    *,
    N: int = 4096,
    K: int = 4096,
    group_size: int = 128,
    act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Launch linear_quantised for M rows routed by R entries."""
    x = empty(M, K, dtype=dtype)
    grouped = kind not in ("int8", "fp8")
    count = K // group_size
    scales = empty(count, N, dtype=torch.bfloat16) if grouped else empty(N)
    zeros = None
    if kind == "int8":
        weight = empty(N, K, dtype=torch.int8)
    elif kind == "fp8":
        weight = empty(N, K, dtype=torch.float8_e4m3fn)
    elif kind == "int4":
        weight, zeros = empty(N, K // 2, dtype=torch.int8), empty(count, N, dtype=torch.bfloat16)
    else:
        weight, zeros = empty(K // 8, N, dtype=torch.int32), empty(count, N // 8, dtype=torch.int32)
    groups = empty(K, dtype=torch.int32) if act_order else None
    l_out = site(N) if has_scale else None
    mixes, route = routing(R)
    linear_quantised(
        x,
        weight,
        scales,
        zeros,
        groups,
        empty(N, dtype=dtype),
        None,
        l_out,
        mixes,
        route,
        kind,
        group_size if grouped else 0,
    )


CASES: dict[str, Case] = {}
for _kind in ("int8", "fp8", "int4", "gptq"):
    CASES |= {
        f"quantised {_kind}, prefill, uniform": Case(partial(_quantised, _kind, 4096, 1), library=("sm_90",)),
        f"quantised {_kind}, prefill, one mix a row": Case(
            partial(_quantised, _kind, 4096, 4096, N=1024), library=("sm_90",)
        ),
        f"quantised {_kind}, decode": Case(partial(_quantised, _kind, 16, 16)),
        f"quantised {_kind}, decode, wide": Case(partial(_quantised, _kind, 1, 1, N=14336)),
        f"quantised {_kind}, 32 rows": Case(partial(_quantised, _kind, 32, 32)),
        f"quantised {_kind}, 64 rows": Case(partial(_quantised, _kind, 64, 64, N=1024)),
    }
CASES |= {
    "quantised int8, decode, SmolLM2": Case(partial(_quantised, "int8", 16, 16, N=192, K=576)),
    "quantised int8, 64 rows, fp32": Case(partial(_quantised, "int8", 64, 64, dtype=torch.float32), matrix=False),
    "quantised int4, decode, groups of 32": Case(partial(_quantised, "int4", 16, 16, group_size=32)),
    # 40 and 80 share no factor with a power of two past 8 and 16, so that a step along K crosses groups.
    "quantised int4, decode, groups of 40": Case(partial(_quantised, "int4", 16, 16, K=4000, group_size=40)),
    "quantised int4, 64 rows, groups of 80": Case(partial(_quantised, "int4", 64, 64, K=4000, group_size=80)),
    "quantised int4, 64 rows, fp32": Case(partial(_quantised, "int4", 64, 64, dtype=torch.float32), matrix=False),
    "quantised gptq, decode, groups of 40": Case(partial(_quantised, "gptq", 16, 16, K=4000, group_size=40)),
    "quantised gptq, decode, fp16": Case(partial(_quantised, "gptq", 16, 16, dtype=torch.float16)),
    "quantised gptq, decode, act-order": Case(partial(_quantised, "gptq", 16, 16, act_order=True)),
}
