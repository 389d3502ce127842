"""The launches of an MLP's first half, at the sizes of Llama-3-8B, SmolLM2-135M and GPT-2."""

from __future__ import annotations

from functools import partial

import torch

from ia3rt.bench.compiled.case import Case, empty, routing, site
from ia3rt.kernels.gate_up import gate_up
from ia3rt.reference import Activation


def _gate_up(
    M: int,
    R: int,
    has_scale: bool,
    *,
    N: int = 14336,
    K: int = 4096,
    kind: Activation = "silu",
    dtype: torch.dtype = torch.bfloat16,
    gated: bool = True,
    halves: bool = False,
    bias: bool = False,
    conv1d: bool = False,
    stride_x: int | None = None,
) -> None:
    """Launch gate_up for M rows routed by R entries."""
    x = empty(M, stride_x or K, dtype=dtype)[:, :K]
    if halves:
        gate, up = empty(2 * N, K, dtype=dtype).chunk(2)
    else:
        gate, up = (empty(K, N, dtype=dtype).t() if conv1d else empty(N, K, dtype=dtype) for _ in range(2))
    bias_gate = empty(N, dtype=dtype) if bias else None
    l = site(N, 4096) if has_scale else None  # noqa: E741
    tables = routing(R)
    if gated:
        gate_up(x, gate, bias_gate, up, bias_gate, l, *tables, kind)
    else:
        gate_up(x, gate, bias_gate, None, None, l, *tables, kind)


_smollm2 = partial(_gate_up, N=1536, K=576)
_gpt2 = partial(_gate_up, N=3072, K=768, kind="gelu_tanh", gated=False, bias=True, conv1d=True)

CASES: dict[str, Case] = {
    "gate_up, prefill, uniform": Case(partial(_gate_up, 4096, 1), wgmma=True, dots=2),
    "gate_up, prefill, one mix a sequence": Case(partial(_gate_up, 4096, 4), wgmma=True, dots=2),
    "gate_up, prefill, one mix a row": Case(partial(_smollm2, 1024, 1024), wgmma=True, dots=2),
    "gate_up, prefill, halves": Case(partial(_gate_up, 512, 1, N=8192, K=3072, halves=True), wgmma=True, dots=2),
    "gate_up, prefill, biases": Case(partial(_gate_up, 4096, 4, kind="gelu", bias=True), wgmma=True, dots=2),
    # Two programs fit a processor: 65,536 registers for 2 × 256 threads.
    "gate_up, prefill, not gated, Conv1D": Case(partial(_gpt2, 4096, 1), wgmma=True, max_registers=128),
    "gate_up, prefill, not gated, one mix a row": Case(partial(_gpt2, 512, 512), wgmma=True),
    "gate_up, prefill, x without descriptors": Case(partial(_gate_up, 4096, 4, stride_x=4100), wgmma=True, dots=2),
    "gate_up, prefill, odd sizes": Case(partial(_gate_up, 1000, 8, N=1001, K=1003, dtype=torch.float16)),
    "gate_up, 64 rows": Case(partial(_gate_up, 64, 64)),
    "gate_up, 64 rows, fp32": Case(partial(_smollm2, 64, 64, dtype=torch.float32), matrix=False),
    "gate_up, decode, one mix a row": Case(partial(_gate_up, 16, 16)),
    "gate_up, decode, uniform": Case(partial(_smollm2, 32, 1)),
    "gate_up, decode, not gated": Case(partial(_gpt2, 16, 16)),
}
