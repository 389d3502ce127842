"""Compares two runs by their ratios, which, unlike seconds, mean the same on a busy day and on an idle one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ia3rt.bench.contenders.registry import OURS
from ia3rt.bench.result import CaseResult, Measurement, Result

TOLERANCE = 0.10
"""A ratio has changed where all of its p20 … p80 lies further than this beyond the other's."""

Verdict = Literal["same", "faster", "slower", "noise", "failed", "missing", "not compared"]
_REGRESSIONS = ("slower", "failed", "missing")


@dataclass(frozen=True)
class Change:
    """One contender's ratio in one case, before and after.

    Attributes:
        case: the suite and the case.
        contender: whose ratio it is.
        reference: to whom.
        before: what was measured first.
        after: what was measured then; None if nothing was.
        verdict: what came of it. "failed": the contender, or the case, failed in the second run. "missing": the second
            run has no word of it. "not compared": that run says why it did not run the case, or its reference is
            another.
    """

    case: str
    contender: str
    reference: str
    before: Measurement
    after: Measurement | None
    verdict: Verdict

    @property
    def is_regression(self) -> bool:
        """Whether ia3rt has become slower, or is measured no more."""
        return self.verdict in _REGRESSIONS and self.contender in OURS


def compare(before: Result, after: Result) -> list[Change]:
    """What has become of the ratios of the first run.

    Raises:
        ValueError: the runs are of different models, devices or dtypes, or have no ratio in common.
    """
    for what in ("model", "device", "dtype"):
        ours, theirs = getattr(before, what), getattr(after, what)
        if ours != theirs:
            raise ValueError(f"the runs cannot be compared: one is of the {what} {ours!r}, the other of {theirs!r}")
    later = {(case.suite, case.name): case for case in after.cases}
    changes = []
    for case in before.cases:
        now = later.get((case.suite, case.name))
        for was in case.measurements:
            if was.ratio is not None:
                measured = None if now is None or now.reference != case.reference else _of(now, was.contender)
                verdict = _verdict(was, measured) if measured else _without(case, was.contender, now, after)
                name = f"{case.suite}: {case.name}"
                changes.append(Change(name, was.contender, case.reference, was, measured, verdict))
    if all(change.verdict in ("missing", "not compared") for change in changes):
        raise ValueError("the runs cannot be compared: they have no ratio in common")
    return changes


def _of(case: CaseResult, contender: str) -> Measurement | None:
    """What a contender's ratio in a case is of."""
    return next((each for each in case.measurements if each.contender == contender and each.ratio is not None), None)


def _without(case: CaseResult, contender: str, now: CaseResult | None, after: Result) -> Verdict:
    """Why the second run has no ratio to compare."""
    if now is None:
        told = {case.suite, f"{case.suite}: {case.name}"} & after.not_run.keys()
        return "not compared" if told else "missing"
    if contender in now.failed or not now.measurements:
        return "failed"
    return "not compared" if contender in [each.contender for each in now.measurements] else "missing"


def _verdict(before: Measurement, after: Measurement) -> Verdict:
    """Noise, too, is slower where all of it is: p20 … p80 do not meet by chance."""
    assert before.ratio is not None and after.ratio is not None
    if after.ratio.p20 > before.ratio.p80 * (1 + TOLERANCE):
        return "slower"
    if after.ratio.p80 < before.ratio.p20 / (1 + TOLERANCE):
        return "faster"
    return "noise" if before.is_noise or after.is_noise else "same"
