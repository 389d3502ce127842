"""A whole gated MLP, scaled at the input of its second matrix: as a patched model runs it by default."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ia3rt import ops
from ia3rt.bench.layers import activation
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
)
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape


def _work(shape: Shape, rows: int) -> dict[str, list[Work]]:
    hidden, width = 2.0 * rows * shape.hidden, 2.0 * rows * shape.intermediate
    matmul = Work(
        hidden + 2.0 * shape.hidden * shape.intermediate + width, 2.0 * rows * shape.hidden * shape.intermediate
    )
    return {way: [matmul, matmul, *between, matmul] for way, between in activation.CASE.work(shape, rows).items()}


class _MLP(nn.Module):
    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        super().__init__()
        options = {"bias": False, "device": inputs.device, "dtype": inputs.dtype}
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, **options)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, **options)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def _ways(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    inputs = Inputs(device, dtype)
    copies = min(16, 1 + (100 << 20) // (6 * shape.hidden * shape.intermediate))
    layers = [_MLP(shape, inputs) for _ in range(copies)]
    adapted = [peft_layers(_MLP(shape, inputs), ["down_proj"], ["down_proj"]) for _ in range(copies)]
    compiled = torch.compile(lambda layer, x: layer(x), dynamic=False)
    x, vectors = inputs.randn(rows, shape.hidden), inputs.site(shape.intermediate)
    routings = {count: inputs.routing(count) for count in (1, rows)}

    def fused(turn: int, count: int) -> object:
        mlp = layers[turn % copies]
        h = ops.activation(mlp.gate_proj(x), mlp.up_proj(x), vectors, *routings[count], "silu")
        return mlp.down_proj(h)

    def separate(turn: int) -> object:
        mlp = layers[turn % copies]
        return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x) * vectors[1].to(dtype))

    return {
        FUSED: lambda turn: fused(turn, 1),
        BY_ROW: lambda turn: fused(turn, rows),
        UNADAPTED: lambda turn: layers[turn % copies](x),
        SEPARATE: separate,
        PEFT: lambda turn: adapted[turn % copies](x),
        PEFT_COMPILED: lambda turn: compiled(adapted[turn % copies], x),
    }


CASE = Case("MLP", _work, _ways)
