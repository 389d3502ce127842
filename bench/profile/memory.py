"""What an adapter takes in memory, from the shapes: IA³ in ia3rt and in PEFT, and a LoRA of the same layers."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from ia3rt.bench.shapes import LLAMA_3_2_1B, LLAMA_3_8B, SMOLLM2_135M, Shape

RANK = 8
WHOLE = (SMOLLM2_135M, LLAMA_3_2_1B, dataclasses.replace(LLAMA_3_8B, layers=32, vocabulary=128256, whole=True))


class Adapter(NamedTuple):
    """The numbers of an adapter."""

    ia3: int
    lora: int


def numbers(shape: Shape) -> Adapter:
    """An IA³ adapter and a LoRA of rank RANK for k, v and down_proj, in all layers."""
    ia3 = 2 * shape.kv_width + shape.intermediate
    lora = RANK * (2 * (shape.hidden + shape.kv_width) + shape.intermediate + shape.hidden)
    return Adapter(shape.layers * ia3, shape.layers * lora)


def table_rows() -> list[tuple[str, ...]]:
    """By model: the adapter's numbers, its megabytes in ia3rt's bank by dtype, and the LoRA's in bfloat16."""
    rows = []
    for shape in WHOLE:
        made = numbers(shape)
        megabytes = (4 * made.ia3, 2 * made.ia3, 2 * made.lora)
        rows.append(
            (
                shape.name,
                f"{made.ia3:,}",
                *(f"{size / 1e6:.2f}" for size in megabytes),
                f"{megabytes[2] / megabytes[0]:.0f} ×",
            )
        )
    return rows
