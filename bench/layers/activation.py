"""silu(gate) · up, scaled: the input site of an MLP's second matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ia3rt import ops
from ia3rt.bench.layers.case import BY_ROW, FUSED, SEPARATE, UNADAPTED, Case, Inputs, Way, vectors_bytes
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape


def _work(shape: Shape, rows: int) -> dict[str, list[Work]]:
    size, width = 2.0 * rows * shape.intermediate, shape.intermediate
    activate, multiply = Work(2 * size, rows * width), Work(3 * size, rows * width)
    scale = Work(2 * size + vectors_bytes(width, rows, by_row=False), rows * width)
    return {
        FUSED: [Work(3 * size + vectors_bytes(width, rows, by_row=False), 3 * rows * width)],
        BY_ROW: [Work(3 * size + vectors_bytes(width, rows, by_row=True), 3 * rows * width)],
        UNADAPTED: [activate, multiply],
        SEPARATE: [activate, multiply, scale],
    }


def _ways(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    inputs, width = Inputs(device, dtype), shape.intermediate
    copies = min(64, 1 + (100 << 20) // (6 * rows * width))
    pairs = [(inputs.randn(rows, width), inputs.randn(rows, width)) for _ in range(copies)]
    vectors = inputs.site(width)
    routings = {count: inputs.routing(count) for count in (1, rows)}

    def fused(turn: int, count: int) -> object:
        return ops.activation(*pairs[turn % copies], vectors, *routings[count], "silu")

    def unadapted(turn: int) -> torch.Tensor:
        gate, up = pairs[turn % copies]
        return torch.mul(F.silu(gate), up)

    return {
        FUSED: lambda turn: fused(turn, 1),
        BY_ROW: lambda turn: fused(turn, rows),
        UNADAPTED: unadapted,
        SEPARATE: lambda turn: unadapted(turn) * vectors[1].to(dtype),
    }


CASE = Case("activation", _work, _ways)
