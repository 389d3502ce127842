"""The rotary embedding of q and k, with the scales of k and v, on one fused projection's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ia3rt import ops
from ia3rt.bench.layers.case import Case, Inputs, Way, copies_of, vectors_bytes
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape


def _works(shape: Shape, rows: int) -> Sequence[list[Work]]:
    q, kv, tables = 2.0 * rows * shape.heads * shape.head_dim, 2.0 * rows * shape.kv_width, 4.0 * rows * shape.head_dim

    def rotate(size: float) -> list[Work]:
        # x · cos; −x2; [−x2, x1]; · sin; + : as transformers' apply_rotary_pos_emb runs
        moved = (2 * size + tables / 2, size, 2 * size, 2 * size + tables / 2, 3 * size)
        return [Work(bytes, size / 2) for bytes in moved]

    scale = Work(2 * kv + vectors_bytes(shape.kv_width, rows, by_row=False), kv / 2)

    def fused(by_row: bool) -> list[Work]:
        moved = 2 * (q + 2 * kv) + tables + 2 * vectors_bytes(shape.kv_width, rows, by_row)
        return [Work(moved, 2 * (q + kv))]

    unadapted = rotate(q) + rotate(kv)
    return fused(False), fused(True), unadapted, [scale, scale, *unadapted]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [rows, heads, D] as transformers does."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def _ways(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    inputs, D = Inputs(device, dtype), shape.head_dim
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    copies = copies_of(4 * rows * sum(heads) * D)
    projected = [inputs.randn(rows, sum(heads), D).split(heads, 1) for _ in range(copies)]
    angles = torch.outer(torch.arange(rows), 10_000 ** (-torch.arange(0, D, 2) / D)).repeat(1, 2).to(device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    l_k, l_v = (inputs.site(shape.kv_width).unflatten(1, (shape.kv_heads, D)) for _ in range(2))

    def fused(turn: int, routing: tuple[Tensor, Tensor]) -> object:
        return ops.rope(*projected[turn % copies], None, l_k, l_v, cos, sin, *routing, False)

    def rotated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _rotated(q, cos[:, None], sin[:, None]), _rotated(k, cos[:, None], sin[:, None]), v

    def separate(turn: int) -> object:
        q, k, v = projected[turn % copies]
        return rotated(q, k * l_k[1].to(dtype), v * l_v[1].to(dtype))

    ways: dict[str, Way] = inputs.in_ways(rows, fused, lambda turn: rotated(*projected[turn % copies]), separate)
    return ways


CASE = Case("rotary embedding", _works, _ways)
