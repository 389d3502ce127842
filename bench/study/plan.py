"""What a run will take: the tokens of each part, counted by what the run does itself, at a speed that is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ia3rt.bench.study.models import BATCH, Prompt, StudyModel

FLOAT32_COST = 4
"""What a token costs in float32, in tokens of bfloat16, on a CPU that multiplies bfloat16; about 1 on others."""

ONE_BY_ONE = 2
"""What a token costs where texts are read one at a time, in tokens of a batch: about."""


@dataclass(frozen=True)
class Part:
    """A part of a run.

    Attributes:
        name: what is done.
        rows: texts that a model reads.
        tokens: of these.
        cost: of a token, in tokens of a forward in the dtype that is trained in.
    """

    name: str
    rows: int
    tokens: int
    cost: int = 1

    @property
    def work(self) -> int:
        """What it costs."""
        return self.tokens * self.cost


def part_of(name: str, rows: int, like: Sequence[Prompt], cost: int) -> Part:
    """A part that reads rows of prompts like these."""
    return Part(name, rows, round(rows * sum(len(each.ids) for each in like) / len(like)), cost)


def tokens_a_second(model: StudyModel, prompts: Sequence[Prompt]) -> float:
    """How fast a model reads, by the better of two batches."""
    batch = list(prompts[:BATCH])
    best = 0.0
    with torch.inference_mode():
        for _ in range(3):  # the first one warms up
            begun = time.perf_counter()
            model.logits(batch)
            best = max(best, sum(len(each.ids) for each in batch) / (time.perf_counter() - begun))
    return best
