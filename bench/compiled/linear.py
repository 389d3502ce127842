"""The launches of the linear layer, of pairs of them, and of the scale alone."""

from __future__ import annotations

from functools import partial

import torch

from ia3rt.bench.compiled.case import Case, empty, routing, site
from ia3rt.kernels.linear import linear
from ia3rt.kernels.linear_pair import linear_pair
from ia3rt.kernels.scale import scale


def _linear(
    M: int,
    R: int,
    has_scale: bool,
    *,
    N: int = 4096,
    K: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    conv1d: bool = False,
    bank_offset: int = 0,
    stride_x: int | None = None,
    pair: bool = False,
) -> None:
    """Launch linear, or linear_pair, for M rows routed by R entries."""
    x = empty(M, stride_x or K, dtype=dtype)[:, :K]
    weight = empty(K, N, dtype=dtype).t() if conv1d else empty(N, K, dtype=dtype)
    l = site(N, bank_offset) if has_scale else None  # noqa: E741
    bias = empty(N, dtype=dtype)
    if pair:
        linear_pair(x, (weight, bias, l), (weight, bias, l), *routing(R))
    else:
        linear(x, weight, bias, None, l, *routing(R))


def _scale(R: int, in_place: bool, has_scale: bool) -> None:
    x = empty(4096, 4096, dtype=torch.bfloat16)
    scale(x, site(4096, 4096), *routing(R), out=x if in_place else None)


CASES: dict[str, Case] = {
    "prefill, uniform": Case(partial(_linear, 4096, 1), wgmma=True),
    "prefill, one mix a sequence": Case(partial(_linear, 4096, 4), wgmma=True),
    # Two programs fit a processor: 65,536 registers for 2 × 256 threads.
    "prefill, two programs a processor": Case(partial(_linear, 4096, 1, N=1024), wgmma=True, max_registers=128),
    "prefill, Conv1D": Case(partial(_linear, 4096, 4, N=2304, K=768, conv1d=True), wgmma=True),
    "prefill, 256 rows": Case(partial(_linear, 256, 1, N=1024, pair=True), wgmma=True),
    "prefill, 512 rows": Case(partial(_linear, 512, 1, N=1024, pair=True), wgmma=True),
    # Where tiles are more than processors, torch multiplies on sm_90 (configs.py).
    "prefill, 256 rows, one mix a row": Case(partial(_linear, 256, 256, N=1024, pair=True), wgmma=True),
    "prefill, 512 rows, one mix a row": Case(partial(_linear, 512, 512, N=1024, pair=True), wgmma=True),
    "prefill, 1,024 rows, one mix a row": Case(partial(_linear, 1024, 1024, N=1024, pair=True), wgmma=True),
    "prefill, unaligned site": Case(partial(_linear, 4096, 4, bank_offset=3), wgmma=True),
    "prefill, x without descriptors": Case(partial(_linear, 4096, 4, stride_x=4100), wgmma=True),
    "prefill, pair": Case(partial(_linear, 4096, 4, N=1024, pair=True), wgmma=True),
    "prefill, wide pair": Case(partial(_linear, 4096, 1, pair=True), wgmma=True),
    "decode, pair": Case(partial(_linear, 16, 16, N=1024, pair=True)),
    "prefill, odd sizes": Case(partial(_linear, 1000, 8, N=1001, K=1003, dtype=torch.float16)),
    "64 rows, fp32": Case(partial(_linear, 64, 64, dtype=torch.float32), matrix=False),
    "64 rows, one mix a row": Case(partial(_linear, 64, 64, N=1024), wgmma=True),
    "decode, one mix a row": Case(partial(_linear, 16, 16)),
    "decode, odd sizes": Case(partial(_linear, 16, 16, N=1001, K=1003)),
    "prefill, SmolLM2's k and v": Case(partial(_linear, 4096, 4, N=192, K=576, pair=True), wgmma=True),
    "decode, SmolLM2's k and v": Case(partial(_linear, 16, 16, N=192, K=576, pair=True)),
    "prefill, SmolLM2's down_proj": Case(partial(_linear, 4096, 1, N=576, K=1536), wgmma=True),
    "scale, uniform": Case(partial(_scale, 1, False), matrix=False),
    "scale, one mix a row": Case(partial(_scale, 4096, False), matrix=False),
    "scale, one mix a row, in place": Case(partial(_scale, 4096, True), matrix=False),
}
