"""The study's statistics against numbers that are known, and against all that could have been drawn."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ia3rt.bench.study import statistics
from ia3rt.bench.study.statistics import Answers


def coins(chance: float, seeds: int, texts: int, seed: int) -> Tensor:
    return (torch.rand(seeds, texts, generator=torch.Generator().manual_seed(seed)) < chance).double()


def test_holm_is_the_papers() -> None:
    adjusted = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert statistics.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_spearman_is_the_textbooks() -> None:
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    found = statistics.spearman(iq, hours)
    assert found is not None
    assert found.value == pytest.approx(-29 / 165)
    assert found.low < found.value < found.high


def test_spearman_shares_ranks_and_knows_no_ranks() -> None:
    found = statistics.spearman([1, 2, 2, 4], [1, 2, 3, 4])  # ranks 1 2.5 2.5 4 beside 1 2 3 4
    assert found is not None
    assert found.value == pytest.approx(0.9486832980505138)
    assert statistics.spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="3 numbers cannot be ranked beside 2"):
        statistics.spearman([1, 2, 3], [1, 2])


def test_the_sign_flip_is_nearly_the_exact_test() -> None:
    """Two tasks of 5 and 6 texts: 2048 ways to flip, all of them counted."""
    one = [coins(0.8, 2, 5, 0), coins(0.8, 2, 6, 1)]
    other = [coins(0.6, 2, 5, 27), coins(0.5, 2, 6, 3)]
    deltas = [(a - b).mean(0) for a, b in zip(one, other, strict=True)]
    weights = torch.cat([each / len(each) for each in deltas])
    flips = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=11)), dtype=torch.float64)
    exact = ((flips @ weights).abs() >= weights.sum().abs() - 1e-12).double().mean()
    assert 0.05 < float(exact) < 0.5
    assert statistics.sign_flip(one, other) == pytest.approx(float(exact), abs=0.015)


def test_the_sign_flip_of_equals_and_of_opposites() -> None:
    same = [coins(0.5, 2, 20, 0)]
    assert statistics.sign_flip(same, same) == 1
    assert statistics.sign_flip([torch.ones(2, 20)], [torch.zeros(2, 20)]) < 0.001


def test_an_interval_is_as_wide_as_the_normal_one() -> None:
    """Many texts and one seed: the bootstrap of a share is near ± 1.96 standard errors."""
    right = coins(0.7, 1, 400, 0)
    found = statistics.accuracy([Answers(right, right, 0.5)])
    share = float(right.mean())
    half = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert found.value == pytest.approx(share)
    assert (found.low, found.high) == pytest.approx((share - half, share + half), abs=0.006)


def test_answers_to_one_text_are_no_more_texts() -> None:
    """The same answers of three seeds: the interval is that of one."""
    one = coins(0.7, 1, 200, 0)
    three = one.repeat(3, 1)
    of_one, of_three = (statistics.accuracy([Answers(each, each, 0.5)]) for each in (one, three))
    assert of_three.high - of_three.low == pytest.approx(of_one.high - of_one.low, rel=0.05)


def test_seeds_that_differ_widen_an_interval() -> None:
    alike = torch.cat([torch.ones(3, 50), torch.zeros(3, 50)], dim=1)
    apart = torch.stack([torch.ones(100), torch.zeros(100), alike[0]])
    of_alike, of_apart = (statistics.accuracy([Answers(x, x, 0.5)]) for x in (alike, apart))
    assert of_apart.high - of_apart.low > 3 * (of_alike.high - of_alike.low)


def test_the_share_kept_is_above_guessing() -> None:
    def answers(right: float, own: float, chance: float) -> Answers:
        first = torch.arange(100) < 100 * right
        return Answers(first.double()[None], (torch.arange(100) < 100 * own).double()[None], chance)

    found = statistics.share_kept([answers(0.7, 0.9, 0.5), answers(0.5, 0.65, 0.25)])
    assert found is not None
    assert found.value == pytest.approx((0.2 + 0.25) / (0.4 + 0.4))
    assert statistics.share_kept([answers(0.5, 0.5, 0.5)]) is None
    whole = statistics.share_kept([answers(0.9, 0.9, 0.5)])
    assert whole is not None
    assert (whole.value, whole.low, whole.high) == pytest.approx((1, 1, 1))  # above and below are redrawn alike


def test_a_difference_is_of_the_same_texts() -> None:
    right = coins(0.7, 2, 100, 0)
    assert statistics.difference([right], [right]) == statistics.Interval(0, 0, 0)
    found = statistics.difference([torch.ones(2, 10)], [torch.zeros(2, 10)])
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
