"""What a run will take: the tokens of each part, counted by what the run does itself, at a speed that is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ia3rt.bench.study.models import BATCH, Prompt, StudyModel

ANSWERS = torch.bfloat16
"""In which dtype a model most likely answers: that is decided by what is measured."""

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
        cost: of a token, in tokens of a forward.
        dtype: that it is done in; None is the one that most likely answers.
    """

    name: str
    rows: int
    tokens: int
    cost: int = 1
    dtype: torch.dtype | None = None


def part_of(name: str, rows: int, like: Sequence[Prompt], cost: int, dtype: torch.dtype | None = None) -> Part:
    """A part that reads rows of prompts like these."""
    return Part(name, rows, round(rows * sum(len(each.ids) for each in like) / len(like)), cost, dtype)


def tokens_a_second(model: StudyModel, prompts: Sequence[Prompt]) -> float:
    """How fast a model reads a batch of prompts of about one length, as it does in a run; the best of three times."""
    ordered = sorted(prompts, key=lambda each: len(each.ids))
    middle = max(0, (len(ordered) - BATCH) // 2)
    batch = ordered[middle : middle + BATCH]
    best = 0.0
    with torch.inference_mode():
        for _ in range(4):  # the first one warms up
            begun = time.perf_counter()
            model.logits(batch)
            best = max(best, sum(len(each.ids) for each in batch) / (time.perf_counter() - begun))
    return best
