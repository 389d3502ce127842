"""Pruning a task vector: which of its numbers stay."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def keep_largest(change: Tensor, density: float) -> Tensor:
    """Keeps the numbers of the largest magnitude, and makes the others 0.

    TIES's trimming (Yadav et al. 2023, "TIES-Merging", algorithm 1), as PEFT has it: the share is one of each site,
    where the paper takes it of the whole model at once, so a site that changes less than others keeps as many numbers.
    int(density · width) of them stay. Of equal magnitudes the first do; PEFT leaves that to torch.topk.

    Args:
        change: float64 [width].
        density: the share that stays, in (0, 1].

    Raises:
        ValueError: that is less than one number, and nothing of the adapter would be left here.
    """
    kept = int(density * change.numel())
    if kept == 0:
        raise ValueError(
            f"a density of {density:g} keeps none of {change.numel()} numbers: give {_least(change.numel()):g} or more"
        )
    largest = change.abs().argsort(descending=True, stable=True)[:kept]
    pruned = torch.zeros_like(change)
    pruned[largest] = change[largest]
    return pruned


def _least(numbers: int) -> float:
    """The least density of two digits that keeps one of them."""
    digits = 1 - math.floor(math.log10(1 / numbers))
    least: float = math.ceil(10.0**digits / numbers) / 10.0**digits
    return least if int(least * numbers) else least + 10.0**-digits


def keep_random(change: Tensor, density: float, key: str) -> Tensor:
    """Drops numbers at random, and divides those that stay by the share of them, so that the expectation is as before.

    DARE (Yu et al. 2024, "Language Models are Super Mario", section 3.2) with drop rate 1 - density: each number is
    drawn by itself, so density · width of them stay only on average. PEFT draws from torch's global generator, of which
    another version or machine may give other numbers; here they come from a hash (SHAKE-256) of `key`.

    Args:
        change: float64 [width].
        density: the probability to stay, in (0, 1].
        key: what the draw depends on besides the width.
    """
    return torch.where(_uniform(change.numel(), key) < density, change / density, 0.0)


def _uniform(count: int, key: str) -> Tensor:
    """Numbers in [0, 1), float64, of 32 bits each."""
    drawn = bytearray(hashlib.shake_256(key.encode()).digest(4 * count))
    digits = torch.frombuffer(drawn, dtype=torch.uint8).view(count, 4).double()
    return ((digits[:, 3] / 256 + digits[:, 2]) / 256 + digits[:, 1]) / 65536 + digits[:, 0] / 256
