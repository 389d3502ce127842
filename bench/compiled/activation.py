"""The launches of the activation, and of its gradient, on the halves of a fused tensor."""

from __future__ import annotations

from functools import partial

import torch

from ia3rt.bench.compiled.case import Case, empty, routing, site
from ia3rt.kernels.activation import activation, activation_gradient
from ia3rt.reference import Activation


def _forward(kind: Activation, R: int, gated: bool, dtype: torch.dtype, has_scale: bool) -> None:
    gate, up = empty(4096, 2 * 4096, dtype=dtype).chunk(2, 1)
    l = site(4096, 4096) if has_scale else None  # noqa: E741
    activation(gate, up if gated else None, l, *routing(R), kind)


def _backward(kind: Activation, R: int, gated: bool, dtype: torch.dtype, has_scale: bool) -> None:
    gate, up = empty(4096, 2 * 4096, dtype=dtype).chunk(2, 1)
    l = site(4096, 4096) if has_scale else None  # noqa: E741
    activation_gradient(gate, gate, up if gated else None, l, *routing(R), kind)


def _cases(
    name: str, kind: Activation, R: int, gated: bool = True, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Case]:
    """Return the case and its gradient's. A processor keeps its 1,024 threads, which read 16 bytes at once."""
    arguments = kind, R, gated, dtype
    forward = Case(partial(_forward, *arguments), matrix=False, max_registers=64, wide_loads=1 + gated)
    backward = Case(partial(_backward, *arguments), matrix=False, max_registers=64, wide_loads=2 + gated)
    return {f"activation, {name}": forward, f"activation gradient, {name}": backward}


CASES: dict[str, Case] = {
    **_cases("silu, uniform", "silu", 1),
    **_cases("silu, one mix a row", "silu", 4096),
    **_cases("gelu, one mix a row, fp32", "gelu", 4096, dtype=torch.float32),
    **_cases("gelu_tanh, one mix a row", "gelu_tanh", 4096),
    **_cases("quick_gelu, uniform", "quick_gelu", 1),
    **_cases("relu2, not gated", "relu2", 4096, gated=False, dtype=torch.float16),
}
