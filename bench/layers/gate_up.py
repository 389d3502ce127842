"""The first two matrices of an MLP, silu(gate) · up, and its scale, in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ia3rt import ops
from ia3rt.bench.layers.case import Case, Inputs, Way, copies_of, vectors_bytes
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape


def _works(shape: Shape, rows: int) -> Sequence[list[Work]]:
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

    return fused(False), fused(True), unadapted, [*unadapted, scale]


def _ways(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    inputs, width = Inputs(device, dtype), shape.intermediate
    copies = copies_of(4 * shape.hidden * width)
    weights = [(inputs.randn(width, shape.hidden), inputs.randn(width, shape.hidden)) for _ in range(copies)]
    x, vectors = inputs.randn(rows, shape.hidden), inputs.site(width)

    def fused(turn: int, routing: tuple[Tensor, Tensor]) -> object:
        gate, up = weights[turn % copies]
        return ops.gate_up(x, gate, None, up, None, vectors, *routing, "silu")

    def unadapted(turn: int) -> Tensor:
        gate, up = weights[turn % copies]
        return torch.mul(F.silu(F.linear(x, gate)), F.linear(x, up))

    ways: dict[str, Way] = inputs.in_ways(rows, fused, unadapted, lambda turn: unadapted(turn) * vectors[1].to(dtype))
    return ways


CASE = Case("gate and up with the activation", _works, _ways)
