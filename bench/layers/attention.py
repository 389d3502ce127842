"""Causal attention over a sequence, with the values' scale: a prefill, or one token that sees what came before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ia3rt import ops
from ia3rt.bench.layers.case import Case, Inputs, Way, copies_of, vectors_bytes
from ia3rt.bench.roofline import Work
from ia3rt.bench.shapes import Shape

PAST = 4096
"""The keys that a decoded token sees. Up to 64 rows are as many sequences' next tokens; more are one prompt's."""


def _sizes(rows: int) -> tuple[int, int, int]:
    """Return (sequences, queries of each, keys of each)."""
    return (rows, 1, PAST) if rows <= 64 else (1, rows, rows)


def _works(shape: Shape, rows: int) -> Sequence[list[Work]]:
    B, Sq, Skv = _sizes(rows)
    q, kv = 2.0 * rows * shape.heads * shape.head_dim, 2.0 * B * Skv * shape.kv_width
    pairs = B * (Sq * (Sq + 1) / 2 if Sq > 1 else Skv)
    flops = 4 * pairs * shape.heads * shape.head_dim
    attend = Work(2 * q + 2 * kv, flops)
    new = 2.0 * rows * shape.kv_width  # a cache holds scaled values: a pass scales those of the new tokens
    scale = Work(2 * new + vectors_bytes(shape.kv_width, rows, by_row=False), new / 2)

    def fused(by_row: bool) -> list[Work]:
        return [Work(attend.bytes + vectors_bytes(shape.kv_width, B, by_row), flops)]

    return fused(False), fused(True), [attend], [scale, attend]


def _ways(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    inputs, D = Inputs(device, dtype), shape.head_dim
    B, Sq, Skv = _sizes(rows)
    copies = copies_of(4 * B * Skv * shape.kv_width, most=8)
    q = inputs.randn(B, Sq, shape.heads, D).transpose(1, 2)
    caches = [[inputs.randn(B, Skv, shape.kv_heads, D).transpose(1, 2) for _ in range(2)] for _ in range(copies)]
    vectors = inputs.site(shape.kv_width)
    l_v = vectors[1].to(dtype).view(shape.kv_heads, 1, D)
    scaled = [(k, v * l_v) for k, v in caches]

    def fused(turn: int, routing: tuple[Tensor, Tensor]) -> Tensor:
        k, v = caches[turn % copies]
        options = (D**-0.5, Sq > 1, None, None)
        o: Tensor = ops.attention(q, k, v, None, None, None, None, vectors, *routing, *options)[0]
        return o.flatten(0, 1)

    def attend(k: Tensor, v: Tensor) -> Tensor:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=Sq > 1, enable_gqa=True)
        return o.transpose(1, 2).flatten(0, 1)

    def separate(turn: int) -> Tensor:
        k, v = scaled[turn % copies]
        _ = v[:, :, -Sq:] * l_v  # the new tokens' pass; it is already in the cache
        return attend(k, v)

    ways: dict[str, Way] = inputs.in_ways(B, fused, lambda turn: attend(*caches[turn % copies]), separate)
    return ways


CASE = Case("attention", _works, _ways)
