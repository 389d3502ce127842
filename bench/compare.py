"""Compares two runs by their ratios, which, unlike seconds, mean the same on a busy day and on an idle one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ia3rt.bench.contenders.registry import OURS
from ia3rt.bench.result import Measurement, Result

TOLERANCE = 0.10
"""A ratio has changed where all of its p20 … p80 lies further than this beyond the other's."""

Verdict = Literal["same", "faster", "slower", "noise"]


@dataclass(frozen=True)
class Change:
    """One contender's ratio in one case, before and after."""

    case: str
    contender: str
    reference: str
    before: float
    after: float
    verdict: Verdict

    @property
    def is_regression(self) -> bool:
        """Whether ia3rt has become slower."""
        return self.verdict == "slower" and self.contender in OURS


def compare(before: Result, after: Result) -> list[Change]:
    """What has changed in the cases and contenders that both runs have.

    Raises:
        ValueError: the runs are of different models, devices or dtypes, or have no ratio in common.
    """
    for what in ("model", "device", "dtype"):
        ours, theirs = getattr(before, what), getattr(after, what)
        if ours != theirs:
            raise ValueError(f"the runs cannot be compared: one is of the {what} {ours!r}, the other of {theirs!r}")
    earlier = dict(_ratios(before))
    changes = [
        Change(*case, earlier[case].ratio.p50, now.ratio.p50, _verdict(earlier[case], now))
        for case, now in _ratios(after)
        if case in earlier
    ]
    if not changes:
        raise ValueError("the runs cannot be compared: they have no ratio in common")
    return changes


def _ratios(result: Result) -> Iterator[tuple[tuple[str, str, str], Measurement]]:
    for case in result.cases:
        for measured in case.measurements:
            if measured.ratio is not None:
                yield (f"{case.suite}: {case.name}", measured.contender, case.reference), measured


def _verdict(before: Measurement, after: Measurement) -> Verdict:
    if before.is_noise or after.is_noise:
        return "noise"
    if after.ratio.p20 > before.ratio.p80 * (1 + TOLERANCE):
        return "slower"
    if after.ratio.p80 < before.ratio.p20 / (1 + TOLERANCE):
        return "faster"
    return "same"
