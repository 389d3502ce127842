"""Shares kept, intervals and tests, from what was answered to each text. Plain torch; all draws come from a seed.

Chance is in which texts a task has, and in the seeds of adapters: one text is asked with many sets of adapters and with
several seeds, so all of that is drawn together, or left out together. The tasks themselves are no sample of anything,
and stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate, and between which numbers 95 of 100 redrawn ones lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Answers:
    """Which answers of one task were right.

    Attributes:
        right: share of right answers over the sets that the task is in, float64 [seeds, texts]: 0 or 1 where it is one
            set.
        own: the same of the task's own adapter, alone.
        chance: 1 / the number of labels.
    """

    right: Tensor
    own: Tensor
    chance: float


def accuracy(by_task: Sequence[Answers], draws: int = DRAWS) -> Interval:
    """The mean accuracy over tasks."""
    drawn = _redrawn([(each.right,) for each in by_task], draws)
    means = torch.stack([task[0] for task in drawn]).mean(0)
    return _interval(_mean([each.right.mean() for each in by_task]), means)


def share_kept(by_task: Sequence[Answers], draws: int = DRAWS) -> Interval | None:
    """Σ (accuracy - chance) / Σ (own adapter's accuracy - chance), over tasks.

    1 is what each task's own adapter has, 0 is guessing; it may be below 0. One quotient of sums and not a mean of
    quotients, which a task near chance would rule. Above and below are of the same texts and seeds.

    Returns:
        None where the tasks' own adapters are no better than chance, so that there is nothing to keep.
    """
    above = sum(float(each.right.mean()) - each.chance for each in by_task)
    below = sum(float(each.own.mean()) - each.chance for each in by_task)
    if below <= 0:
        return None
    drawn = _redrawn([(each.right, each.own) for each in by_task], draws)
    chances = sum(each.chance for each in by_task)
    tops = torch.stack([right for right, _ in drawn]).sum(0) - chances
    bottoms = torch.stack([own for _, own in drawn]).sum(0) - chances
    return _interval(above / below, tops / bottoms)


def difference(one: Sequence[Tensor], other: Sequence[Tensor], draws: int = DRAWS) -> Interval:
    """Mean over tasks of how much more often one is right than the other, on the same texts [seeds, texts]."""
    each = [(a - b,) for a, b in zip(one, other, strict=True)]
    drawn = torch.stack([task[0] for task in _redrawn(each, draws)]).mean(0)
    return _interval(_mean([delta.mean() for (delta,) in each]), drawn)


def sign_flip(one: Sequence[Tensor], other: Sequence[Tensor], draws: int = DRAWS) -> float:
    """The p-value of a paired, two-sided permutation test that one is right as often as the other.

    What is exchanged under the hypothesis are the two answers to a text: each text's difference, its mean over sets and
    seeds, gets a random sign. The statistic is the mean over tasks of the mean over texts. It is (1 + as large ones) /
    (1 + draws), so never 0 (Phipson & Smyth 2010, "Permutation p-values should never be zero").
    """
    generator = torch.Generator().manual_seed(0)
    observed = torch.zeros((), dtype=torch.float64)
    flipped = torch.zeros(draws, dtype=torch.float64)
    for a, b in zip(one, other, strict=True):
        deltas = (a - b).double().mean(0)
        signs = torch.randint(0, 2, (draws, len(deltas)), generator=generator).double() * 2 - 1
        observed += deltas.mean()
        flipped += signs @ deltas / len(deltas)
    as_large = int((flipped.abs() >= observed.abs() - 1e-12).sum())
    return (1 + as_large) / (1 + draws)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values as they are where one is tested of so many: Holm 1979, by name.

    The smallest is multiplied by their number, the next by one less, and so on; none is less than one before it.
    """
    adjusted: dict[str, float] = {}
    so_far, left = 0.0, len(p_values)
    for name in sorted(p_values, key=lambda name: p_values[name]):
        so_far = max(so_far, min(1.0, left * p_values[name]))
        adjusted[name], left = so_far, left - 1
    return {name: adjusted[name] for name in p_values}


def spearman(xs: Sequence[float], ys: Sequence[float], draws: int = DRAWS) -> Interval | None:
    """Spearman's rank correlation, with an interval of redrawn pairs; equal numbers share their mean rank.

    Returns:
        None where one of them is all the same, which has no ranks.

    Raises:
        ValueError: they are not as many.
    """
    # Rounded, so that what is equal but for how it was added up shares a rank.
    x, y = (torch.tensor(each, dtype=torch.float64).round(decimals=9) for each in (xs, ys))
    if len(x) != len(y):
        raise ValueError(f"{len(x)} numbers cannot be ranked beside {len(y)}")
    value = float(_correlation(_ranks(x), _ranks(y)))
    if value != value:
        return None
    places = torch.randint(0, len(x), (draws, len(x)), generator=torch.Generator().manual_seed(0))
    return _interval(value, _correlation(_ranks(x[places]), _ranks(y[places])))


def _redrawn(by_task: Sequence[tuple[Tensor, ...]], draws: int) -> list[list[Tensor]]:
    """Means [draws] of each tensor [seeds, texts], as they are with seeds and texts drawn anew, with replacement.

    Seeds are drawn once for all tasks, as sets of adapters are of one seed; texts for each task. The tensors of one
    task are redrawn alike.
    """
    generator = torch.Generator().manual_seed(0)
    seeds = by_task[0][0].shape[0]
    of_seeds = _counts(draws, seeds, generator)
    means = []
    for tensors in by_task:
        of_texts = _counts(draws, tensors[0].shape[1], generator)
        means.append([torch.einsum("ds,st,dt->d", of_seeds, each.double(), of_texts) for each in tensors])
    return means


def _counts(draws: int, count: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` was drawn, as a share, float64 [draws, count]."""
    places = torch.randint(0, count, (draws, count), generator=generator)
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(
        1, places, torch.full((draws, count), 1 / count, dtype=torch.float64)
    )


def _interval(value: float, drawn: Tensor) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    drawn = drawn[drawn.isfinite()]  # no number where what divides it was redrawn as 0
    if not len(drawn):
        return Interval(value, float("nan"), float("nan"))
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).double().mean())


def _ranks(x: Tensor) -> Tensor:
    """From 1, of the numbers in the last dimension; equal numbers have the mean of theirs."""
    one, other = x[..., :, None], x[..., None, :]
    return (one > other).sum(-1).double() + ((one == other).sum(-1).double() + 1) / 2


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, over the last dimension; NaN where one is all the same."""
    x, y = (each - each.mean(-1, keepdim=True) for each in (x, y))
    found: Tensor = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return found
