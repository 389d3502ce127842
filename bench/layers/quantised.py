"""The value projection with an int4 weight, scaled at its output.

Torch has no matmul for it on every card: the layer without IA³ is the same kernel without a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ia3rt import ops
from ia3rt.bench.layers.case import Case, Inputs, Way, copies_of, vectors_bytes
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape

GROUP = 32
"""Neighbours along K that share a scale and a zero."""


def _works(shape: Shape, rows: int) -> Sequence[list[Work]]:
    hidden, width = shape.hidden, shape.kv_width
    x, y = 2.0 * rows * hidden, 2.0 * rows * width
    weight = hidden * width * (0.5 + 2 * 2 / GROUP)
    flops = 2.0 * rows * hidden * width
    matmul = Work(x + weight + y, flops)
    scale = Work(2 * y + vectors_bytes(width, rows, by_row=False), rows * width)

    def fused(by_row: bool) -> list[Work]:
        return [Work(matmul.bytes + vectors_bytes(width, rows, by_row), flops)]

    return fused(False), fused(True), [matmul], [matmul, scale]


def _ways(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    inputs, hidden, width = Inputs(device, dtype), shape.hidden, shape.kv_width
    copies = copies_of(hidden * width / 2)
    weights = [
        (
            torch.randint(-128, 128, (width, hidden // 2), dtype=torch.int8, device=device),
            inputs.randn(hidden // GROUP, width) / 8,
            inputs.randn(hidden // GROUP, width),
        )
        for _ in range(copies)
    ]
    x, vectors = inputs.randn(rows, hidden), inputs.site(width)
    without = inputs.routing(1)

    def multiply(turn: int, routing: tuple[Tensor, Tensor] = without, l_out: Tensor | None = None) -> Tensor:
        parts = (*weights[turn % copies], None, None, None, l_out, *routing, "int4", GROUP)
        y: Tensor = ops.linear_quantised(x, *parts)
        return y

    ways: dict[str, Way] = inputs.in_ways(
        rows, partial(multiply, l_out=vectors), multiply, lambda turn: multiply(turn) * vectors[1].to(dtype)
    )
    return ways


CASE = Case("int4 projection", _works, _ways)
