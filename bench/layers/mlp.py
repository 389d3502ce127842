"""A whole gated MLP, scaled at the input of its second matrix: as a patched model runs it by default."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ia3rt import ops
from ia3rt.bench.layers import activation
from ia3rt.bench.layers.case import Case, Inputs, Way, copies_of, peft_ways
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape


def _works(shape: Shape, rows: int) -> Sequence[list[Work]]:
    hidden, width = 2.0 * rows * shape.hidden, 2.0 * rows * shape.intermediate
    matmul = Work(
        hidden + 2.0 * shape.hidden * shape.intermediate + width, 2.0 * rows * shape.hidden * shape.intermediate
    )
    return [[matmul, matmul, *between, matmul] for between in activation.CASE.works(shape, rows)]


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
    copies = copies_of(6 * shape.hidden * shape.intermediate, most=16)
    layers = [_MLP(shape, inputs) for _ in range(copies)]
    others = [_MLP(shape, inputs) for _ in range(copies)]
    x, vectors = inputs.randn(rows, shape.hidden), inputs.site(shape.intermediate)

    def fused(turn: int, routing: tuple[Tensor, Tensor]) -> object:
        mlp = layers[turn % copies]
        h = ops.activation(mlp.gate_proj(x), mlp.up_proj(x), vectors, *routing, "silu")
        return mlp.down_proj(h)

    def separate(turn: int) -> object:
        mlp = layers[turn % copies]
        return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x) * vectors[1].to(dtype))

    ours = inputs.in_ways(rows, fused, lambda turn: layers[turn % copies](x), separate)
    return {**ours, **peft_ways(others, ["down_proj"], ["down_proj"], x)}


CASE = Case("MLP", _works, _ways)
