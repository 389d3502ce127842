"""The key and the value projection of a layer, each scaled at its output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ia3rt import ops
from ia3rt.bench.layers.case import (
    BY_ROW,
    FUSED,
    PEFT,
    PEFT_COMPILED,
    SEPARATE,
    UNADAPTED,
    Case,
    Inputs,
    Way,
    peft_layers,
    vectors_bytes,
)
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape


def _work(shape: Shape, rows: int) -> dict[str, list[Work]]:
    hidden, width = shape.hidden, shape.kv_width
    x, weight, y = 2.0 * rows * hidden, 2.0 * hidden * width, 2.0 * rows * width
    flops = 2.0 * rows * hidden * width
    matmul = Work(x + weight + y, flops)
    scale = Work(2 * y + vectors_bytes(width, rows, by_row=False), rows * width)

    def fused(by_row: bool) -> list[Work]:
        return [Work(x + 2 * (weight + y + vectors_bytes(width, rows, by_row)), 2 * flops)]

    return {
        FUSED: fused(False),
        BY_ROW: fused(True),
        UNADAPTED: [matmul, matmul],
        SEPARATE: [matmul, matmul, scale, scale],
    }


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
    # So many copies that they do not fit an H100's L2 cache together: a model's other layers would have taken it.
    copies = min(64, 1 + (100 << 20) // (4 * shape.hidden * shape.kv_width))
    layers = [_Projections(shape, inputs) for _ in range(copies)]
    x, l_k, l_v = inputs.randn(rows, shape.hidden), inputs.site(shape.kv_width), inputs.site(shape.kv_width)
    routings = {count: inputs.routing(count) for count in (1, rows)}
    adapted = [peft_layers(_Projections(shape, inputs), ["k_proj", "v_proj"], []) for _ in range(copies)]
    compiled = torch.compile(lambda layer, x: layer(x), dynamic=False)

    def fused(turn: int, count: int) -> object:
        layer = layers[turn % copies]
        return ops.linear_pair(x, layer.k_proj.weight, None, l_k, layer.v_proj.weight, None, l_v, *routings[count])

    def unadapted(turn: int) -> tuple[Tensor, Tensor]:
        layer = layers[turn % copies]
        return F.linear(x, layer.k_proj.weight), F.linear(x, layer.v_proj.weight)

    def separate(turn: int) -> object:
        k, v = unadapted(turn)
        return k * l_k[1].to(dtype), v * l_v[1].to(dtype)

    return {
        FUSED: lambda turn: fused(turn, 1),
        BY_ROW: lambda turn: fused(turn, rows),
        UNADAPTED: unadapted,
        SEPARATE: separate,
        PEFT: lambda turn: adapted[turn % copies](x),
        PEFT_COMPILED: lambda turn: compiled(adapted[turn % copies], x),
    }


CASE = Case("key and value projections", _work, _ways)
