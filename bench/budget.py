"""A budget: ratios that a run must keep, in a JSON file that says them once for all cases that a pattern matches."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ia3rt.bench.result import CaseResult, Result


@dataclass(frozen=True)
class Rule:
    """A bound.

    Attributes:
        suite: the suite.
        case: the cases, with the shell's wildcards.
        contender: whose ratio it is.
        reference: to whom.
        most: broken where all of the ratio's p20 … p80 is larger.
        why: for whom breaks it.
    """

    suite: str
    case: str
    contender: str
    reference: str
    most: float
    why: str = ""


@dataclass(frozen=True)
class Broken:
    """A rule that a case broke."""

    rule: Rule
    case: str
    ratio: float

    def __str__(self) -> str:
        """In a line."""
        rule = self.rule
        return (
            f"{rule.suite}: {self.case}: {rule.contender} took {self.ratio:.3g} of {rule.reference}'s, and may take "
            f"{rule.most:g}" + (f" ({rule.why})" if rule.why else "")
        )


def read_budget(file: Path) -> list[Rule]:
    """Reads a budget.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a budget.
    """
    try:
        rules = [Rule(**plain) for plain in json.loads(file.read_text("utf-8"))["rules"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a budget: {error!r}") from error
    if not rules or not all(isinstance(rule.most, (int, float)) and rule.most > 0 for rule in rules):
        raise ValueError(f"{file} is not a budget: it needs rules, each with a positive `most`")
    return rules


def check(result: Result, rules: Sequence[Rule]) -> tuple[list[Broken], list[Rule]]:
    """Returns what is broken, and the rules that no case of the run was there for.

    A ratio that is noise counts too: that even its p20 is too large is no noise.
    """
    broken, idle = [], []
    for rule in rules:
        cases = [
            case for case in result.cases if case.suite == rule.suite and fnmatch.fnmatchcase(case.name, rule.case)
        ]
        ratios = {case.name: _p20(case, rule) for case in cases}
        measured = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        if not measured:
            idle.append(rule)
        broken += [Broken(rule, name, ratio) for name, ratio in measured.items() if ratio > rule.most]
    return broken, idle


def _p20(case: CaseResult, rule: Rule) -> float | None:
    if case.reference != rule.reference:
        return None
    for measured in case.measurements:
        if measured.contender == rule.contender and measured.ratio is not None:
            ratio: float = measured.ratio.p20
            return ratio
    return None
