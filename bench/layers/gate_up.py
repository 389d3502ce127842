"""The first two matrices of an MLP, silu(gate) · up, and its scale, in one kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ia3rt import ops
from ia3rt.bench.layers.case import BY_ROW, FUSED, SEPARATE, UNADAPTED, Case, Inputs, Way, vectors_bytes
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape


def _work(shape: Shape, rows: int) -> dict[str, list[Work]]:
    hidden, width = shape.hidden, shape.intermediate
    x, weight, size = 2.0 * rows * hidden, 2.0 * hidden * width, 2.0 * rows * width
    flops = 2.0 * rows * hidden * width
    unadapted = [
        Work(x + weight + size, flops),
        Work(x + weight + size, flops),
        Work(2 * size, rows * width),
        Work(3 * size, rows * width),
    ]
    scale = Work(2 * size + vectors_bytes(width, rows, by_row=False), rows * width)

    def fused(by_row: bool) -> list[Work]:
        return [Work(x + 2 * weight + size + vectors_bytes(width, rows, by_row), 2 * flops)]

    return {FUSED: fused(False), BY_ROW: fused(True), UNADAPTED: unadapted, SEPARATE: [*unadapted, scale]}


def _ways(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    inputs, width = Inputs(device, dtype), shape.intermediate
    copies = min(64, 1 + (100 << 20) // (4 * shape.hidden * width))
    weights = [(inputs.randn(width, shape.hidden), inputs.randn(width, shape.hidden)) for _ in range(copies)]
    x, vectors = inputs.randn(rows, shape.hidden), inputs.site(width)
    routings = {count: inputs.routing(count) for count in (1, rows)}

    def fused(turn: int, count: int) -> object:
        gate, up = weights[turn % copies]
        return ops.gate_up(x, gate, None, up, None, vectors, *routings[count], "silu")

    def unadapted(turn: int) -> Tensor:
        gate, up = weights[turn % copies]
        return torch.mul(F.silu(F.linear(x, gate)), F.linear(x, up))

    return {
        FUSED: lambda turn: fused(turn, 1),
        BY_ROW: lambda turn: fused(turn, rows),
        UNADAPTED: unadapted,
        SEPARATE: lambda turn: unadapted(turn) * vectors[1].to(dtype),
    }


CASE = Case("gate and up with the activation", _work, _ways)
