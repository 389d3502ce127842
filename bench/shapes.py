"""The sizes of models that benchmarks run at, with random weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder layer."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def kv_width(self) -> int:
        """The width of the keys, and of the values."""
        return self.kv_heads * self.head_dim


LLAMA_3_8B = Shape("llama-3-8b", 4096, 32, 8, 128, 14336)
SMOLLM2_135M = Shape("smollm2-135m", 576, 9, 3, 64, 1536)
TINY = Shape("tiny", 64, 4, 2, 16, 96)  # what a test has time for
SHAPES = {shape.name: shape for shape in (LLAMA_3_8B, SMOLLM2_135M, TINY)}
