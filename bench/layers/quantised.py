"""The value projection with an int4 weight, scaled at its output.

Torch has no matmul for it on every card: the layer without IA³ is the same kernel without a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ia3rt import ops
from ia3rt.bench.layers.case import BY_ROW, FUSED, SEPARATE, UNADAPTED, Case, Inputs, Way, vectors_bytes
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape

GROUP = 32
"""Neighbours along K that share a scale and a zero."""


def _work(shape: Shape, rows: int) -> dict[str, list[Work]]:
    hidden, width = shape.hidden, shape.kv_width
    x, y = 2.0 * rows * hidden, 2.0 * rows * width
    weight = hidden * width * (0.5 + 2 * 2 / GROUP)
    flops = 2.0 * rows * hidden * width
    matmul = Work(x + weight + y, flops)
    scale = Work(2 * y + vectors_bytes(width, rows, by_row=False), rows * width)

    def fused(by_row: bool) -> list[Work]:
        return [Work(matmul.bytes + vectors_bytes(width, rows, by_row), flops)]

    return {FUSED: fused(False), BY_ROW: fused(True), UNADAPTED: [matmul], SEPARATE: [matmul, scale]}


def _ways(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    inputs, hidden, width = Inputs(device, dtype), shape.hidden, shape.kv_width
    copies = min(64, 1 + (200 << 20) // (hidden * width))
    weights = [
        (
            torch.randint(-128, 128, (width, hidden // 2), dtype=torch.int8, device=device),
            inputs.randn(hidden // GROUP, width) / 8,
            inputs.randn(hidden // GROUP, width),
        )
        for _ in range(copies)
    ]
    x, vectors = inputs.randn(rows, hidden), inputs.site(width)
    routings = {count: inputs.routing(count) for count in (1, rows)}

    def multiply(turn: int, l_out: Tensor | None, count: int) -> Tensor:
        parts = (*weights[turn % copies], None, None, None, l_out, *routings[count], "int4", GROUP)
        y: Tensor = ops.linear_quantised(x, *parts)
        return y

    return {
        FUSED: lambda turn: multiply(turn, vectors, 1),
        BY_ROW: lambda turn: multiply(turn, vectors, rows),
        UNADAPTED: lambda turn: multiply(turn, None, 1),
        SEPARATE: lambda turn: multiply(turn, None, 1) * vectors[1].to(dtype),
    }


CASE = Case("int4 projection", _work, _ways)
