"""The sizes of models that benchmarks run at, with random weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder layer, and of the model made of it."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    vocabulary: int
    tied: bool = True
    """Whether the embeddings are the last matrix too."""
    whole: bool = True
    """Whether the layers and the vocabulary are the real model's, or fewer, so that it fits."""

    @property
    def kv_width(self) -> int:
        """The width of the keys, and of the values."""
        return self.kv_heads * self.head_dim


LLAMA_3_8B = Shape("llama-3-8b", 4096, 32, 8, 128, 14336, layers=4, vocabulary=4096, tied=False, whole=False)
LLAMA_3_2_1B = Shape("llama-3.2-1b", 2048, 32, 8, 64, 8192, layers=16, vocabulary=128256)
SMOLLM2_135M = Shape("smollm2-135m", 576, 9, 3, 64, 1536, layers=30, vocabulary=49152)
TINY = Shape("tiny", 64, 4, 2, 16, 96, layers=2, vocabulary=128)  # what a test has time for
SHAPES = {shape.name: shape for shape in (LLAMA_3_8B, LLAMA_3_2_1B, SMOLLM2_135M, TINY)}
