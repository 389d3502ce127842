"""The key and the value projection of a layer, each scaled at its output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ia3rt import ops
from ia3rt.bench.layers.case import Case, Inputs, Way, copies_of, peft_ways, vectors_bytes
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape


def _works(shape: Shape, rows: int) -> Sequence[list[Work]]:
    hidden, width = shape.hidden, shape.kv_width
    x, weight, y = 2.0 * rows * hidden, 2.0 * hidden * width, 2.0 * rows * width
    flops = 2.0 * rows * hidden * width
    matmul = Work(x + weight + y, flops)
    scale = Work(2 * y + vectors_bytes(width, rows, by_row=False), rows * width)

    def fused(by_row: bool) -> list[Work]:
        return [Work(x + 2 * (weight + y + vectors_bytes(width, rows, by_row)), 2 * flops)]

    return fused(False), fused(True), [matmul, matmul], [matmul, matmul, scale, scale]


class _Projections(nn.Module):
    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        super().__init__()
        self.k_proj, self.v_proj = (
            nn.Linear(shape.hidden, shape.kv_width, bias=False, device=inputs.device, dtype=inputs.dtype)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_proj(x), self.v_proj(x)


def _ways(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    inputs = Inputs(device, dtype)
    copies = copies_of(4 * shape.hidden * shape.kv_width)
    layers = [_Projections(shape, inputs) for _ in range(copies)]
    x, l_k, l_v = inputs.randn(rows, shape.hidden), inputs.site(shape.kv_width), inputs.site(shape.kv_width)
    others = [_Projections(shape, inputs) for _ in range(copies)]

    def fused(turn: int, routing: tuple[Tensor, Tensor]) -> object:
        layer = layers[turn % copies]
        return ops.linear_pair(x, layer.k_proj.weight, None, l_k, layer.v_proj.weight, None, l_v, *routing)

    def unadapted(turn: int) -> tuple[Tensor, Tensor]:
        layer = layers[turn % copies]
        return F.linear(x, layer.k_proj.weight), F.linear(x, layer.v_proj.weight)

    def separate(turn: int) -> object:
        k, v = unadapted(turn)
        return k * l_k[1].to(dtype), v * l_v[1].to(dtype)

    ours = inputs.in_ways(rows, fused, unadapted, separate)
    return {**ours, **peft_ways(others, ["k_proj", "v_proj"], [], x)}


CASE = Case("key and value projections", _works, _ways)
