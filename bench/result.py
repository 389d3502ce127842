"""What a run measured, and its JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ia3rt.bench.interleaved import Timing

SCHEMA = 2
READABLE = (1, SCHEMA)
"""Schemas that are read; the first has no controls."""
CONTROL = "control"
"""What the second measurement of a case's reference is called."""
STOPPED = "the run was stopped"
"""Why a case was not run after Ctrl-C."""
NOISE = 0.05
"""A ratio whose median may be off by more than this share of it, by chance, is noise, and is not printed."""


@dataclass(frozen=True)
class Measurement:
    """What one contender took in one case.

    Attributes:
        contender: its name.
        taken: seconds a run (bytes, where the case is about them), over all rounds.
        ratio: to the reference, paired: each round's by the reference's in the same round. None for the reference,
            and where the reference took nothing.
        turns: how many runs one sample is the mean of.
        samples: by round.
        note: what a reader has to know about it.
    """

    contender: str
    taken: Timing
    ratio: Timing | None = None
    turns: int = 1
    samples: Sequence[float] = ()
    note: str = ""

    @classmethod
    def of(
        cls, contender: str, samples: list[float], reference: list[float] | None, turns: int = 1, note: str = ""
    ) -> Measurement:
        """The percentiles of a contender's samples, and of their ratios to the reference's."""
        ratio = None
        if reference is not None and all(reference):
            ratio = Timing.of([ours / theirs for ours, theirs in zip(samples, reference, strict=True)])
        return cls(contender, Timing.of(samples), ratio, turns, tuple(samples), note)

    @property
    def error(self) -> float:
        """How far the ratio's median may be off by chance: two of its standard errors.

        Of samples spread as p20 … p80 say: these are 1.68 standard deviations apart, and a median's error is 1.25 of a
        mean's.
        """
        if self.ratio is None or self.ratio.p80 == self.ratio.p20:
            return 0.0
        deviation: float = (self.ratio.p80 - self.ratio.p20) / 1.68
        return 2 * 1.25 * deviation / math.sqrt(max(1, len(self.samples)))

    @property
    def is_noise(self) -> bool:
        """Whether the ratio must not be printed."""
        return self.ratio is not None and not self.error <= NOISE * self.ratio.p50

    @property
    def doubt(self) -> float:
        """How far a control's ratio is from 1, where it should be 1, or may be by chance."""
        return 0.0 if self.ratio is None else max(abs(float(self.ratio.p50) - 1), self.error)

    def is_within(self, control: Measurement | None) -> bool:
        """Whether the ratio is no further from 1 than the control's, or than chance: no win and no loss."""
        if control is None or self.ratio is None:
            return False
        return bool(abs(self.ratio.p50 - 1) <= max(control.doubt, self.error))


@dataclass(frozen=True)
class CaseResult:
    """What all contenders took in one case.

    Attributes:
        suite: the suite's name.
        what: what was done.
        parameters: its numbers.
        name: both in a line.
        reference: the contender that ratios are to.
        unit: what `work` counts; "bytes" where what was taken are bytes.
        work: how many of them one run does.
        measurements: by contender.
        left_out: why the others were not timed.
        failed: which raised, or computed another result, and were not timed.
        control: the reference, timed a second time; its ratio would be 1 if nothing but the contender mattered. None
            for values, without a reference, and in what an earlier version wrote.
    """

    suite: str
    what: str
    parameters: dict[str, int | str]
    name: str
    reference: str
    unit: str
    work: int | None
    measurements: list[Measurement]
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    control: Measurement | None = None

    @property
    def all_measured(self) -> list[Measurement]:
        """The contenders' measurements, and the control's after them."""
        return [*self.measurements, *([self.control] if self.control else [])]

    def rate(self, measurement: Measurement) -> float | None:
        """Units a second at the median; None where that says nothing."""
        return None if self.work is None else self.work / measurement.taken.p50


@dataclass
class Result:
    """A run.

    Attributes:
        date: when it began, in UTC.
        command: what was typed.
        model: what it ran on.
        device: where.
        dtype: in which type.
        adapter: how many numbers an adapter of the model is.
        contenders: who was asked for.
        machine: see `machine.machine`.
        versions: see `machine.versions`.
        cases: what was measured.
        not_run: cases and suites that were not, and why.
    """

    date: str
    command: str
    model: str
    device: str
    dtype: str
    adapter: int
    contenders: list[str]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    cases: list[CaseResult] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)

    @property
    def is_stopped(self) -> bool:
        """Whether Ctrl-C ended the run before its cases did."""
        return STOPPED in self.not_run.values()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not any(case.measurements for case in self.cases)

    @property
    def failures(self) -> list[str]:
        """A line for each contender that failed in a case."""
        return [f"{case.suite}: {case.name}: {who}: {why}" for case in self.cases for who, why in case.failed.items()]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        made = {"schema": SCHEMA, "noise_bound": NOISE, **asdict(self)}
        for case, plain in zip(self.cases, made["cases"], strict=True):
            for measurement, numbers in zip(case.measurements, plain["measurements"], strict=True):
                numbers["noise"] = measurement.is_noise
                numbers["within_noise"] = measurement.is_within(case.control)
            if case.control is not None:
                plain["control"]["doubt"] = case.control.doubt
        return made

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Result:
        """The inverse of `as_dict`.

        Raises:
            ValueError: it is not a result, or one of another schema.
        """
        if plain.get("schema") not in READABLE:
            known = " or ".join(map(str, READABLE))
            raise ValueError(f"not a result of `ia3rt bench` with schema {known}: it has {plain.get('schema')!r}")
        cases = []
        for case in plain["cases"]:
            measurements = [_measurement(numbers) for numbers in case["measurements"]]
            control = None if case.get("control") is None else _measurement(case["control"])
            cases.append(_made(CaseResult, case, measurements=measurements, control=control))
        result: Result = _made(cls, plain, cases=cases)
        return result


def _measurement(plain: dict[str, Any]) -> Any:
    ratio = plain["ratio"] and Timing(**plain["ratio"])
    return _made(Measurement, plain, taken=Timing(**plain["taken"]), ratio=ratio)


def _made(kind: Any, plain: dict[str, Any], **parts: Any) -> Any:
    """What JSON holds of a dataclass: without what was added for those who read the JSON, which it computes anew."""
    names = {field.name for field in fields(kind)}
    return kind(**({name: value for name, value in plain.items() if name in names} | parts))


def write_json(result: Result, file: Path) -> None:
    """Writes a run."""
    file.write_text(json.dumps(result.as_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_json(file: Path) -> Result:
    """Reads a run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        plain = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    try:
        return Result.from_dict(plain)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a result of `ia3rt bench`: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


_RATIO = ("reference", "ratio_p20", "ratio_p50", "ratio_p80", "noise", "within_noise")
COLUMNS = ("suite", "case", "contender", "unit", "p20", "p50", "p80", "per_second", *_RATIO, "rounds", "turns", "note")


def write_csv(result: Result, file: Path) -> None:
    """Writes a line for each contender of each case, and for the control; a ratio that is noise is left empty."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(COLUMNS)
        for case in result.cases:
            for measurement in case.all_measured:
                writer.writerow(_line(case, measurement))


def _line(case: CaseResult, measured: Measurement) -> list[object]:
    taken, ratio, rate = measured.taken, measured.ratio, case.rate(measured)
    shown = ("", "", "") if ratio is None or measured.is_noise else (ratio.p20, ratio.p50, ratio.p80)
    unit = "bytes" if case.unit == "bytes" else "s"
    head = [case.suite, case.name, measured.contender, unit, taken.p20, taken.p50, taken.p80]
    tail = [measured.is_noise, measured.is_within(case.control), len(measured.samples), measured.turns, measured.note]
    return [*head, "" if rate is None else rate, case.reference, *shown, *tail]
