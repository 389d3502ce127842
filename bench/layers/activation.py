"""silu(gate) · up, scaled: the input site of an MLP's second matrix."""

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
    size, width = 2.0 * rows * shape.intermediate, shape.intermediate
    activate, multiply = Work(2 * size, rows * width), Work(3 * size, rows * width)
    scale = Work(2 * size + vectors_bytes(width, rows, by_row=False), rows * width)

    def fused(by_row: bool) -> list[Work]:
        return [Work(3 * size + vectors_bytes(width, rows, by_row), 3 * rows * width)]

    return fused(False), fused(True), [activate, multiply], [activate, multiply, scale]


def _ways(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    inputs, width = Inputs(device, dtype), shape.intermediate
    copies = copies_of(6 * rows * width)
    pairs = [(inputs.randn(rows, width), inputs.randn(rows, width)) for _ in range(copies)]
    vectors = inputs.site(width)

    def fused(turn: int, routing: tuple[Tensor, Tensor]) -> object:
        return ops.activation(*pairs[turn % copies], vectors, *routing, "silu")

    def unadapted(turn: int) -> Tensor:
        gate, up = pairs[turn % copies]
        return torch.mul(F.silu(gate), up)

    ways: dict[str, Way] = inputs.in_ways(rows, fused, unadapted, lambda turn: unadapted(turn) * vectors[1].to(dtype))
    return ways


CASE = Case("activation", _works, _ways)
