"""Runs the cases: builds the contenders, compares what they compute, warms up, and times them in turn."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone

import torch
from torch import Tensor

from ia3rt.bench.contenders.registry import CONTENDERS, TWICE
from ia3rt.bench.contenders.subject import Way
from ia3rt.bench.interleaved import Seconds, sample_interleaved
from ia3rt.bench.likeness import distance, tolerance_of
from ia3rt.bench.machine import machine, versions
from ia3rt.bench.models import title_of
from ia3rt.bench.result import CONTROL, STOPPED, CaseResult, Measurement, Result
from ia3rt.bench.settings import Effort, Settings
from ia3rt.bench.suites.case import Case, Value, Ways, described
from ia3rt.bench.suites.registry import SUITES, cases_of
from ia3rt.bench.workshop import Workshop
from ia3rt.cli.errors import MissingPackageError
from ia3rt.cli.packages import quiet

WARM_UPS = 8
"""Rounds of warming up at most; fewer where the times no longer fall."""
FEWEST = 3
"""Rounds that a case is given even where the run's deadline passes meanwhile."""
SETTLED = 0.9
"""A round that takes more than this share of the fastest before it is no longer getting faster."""

Clock = Callable[[], float]
Shown = Callable[[int, int, str], None]
"""Is told how many of how many cases are done, and which one begins."""


class OutOfTimeError(Exception):
    """The run's deadline is too near for the case."""


def run(settings: Settings, progress: Shown = lambda *_: None, clock: Clock = time.perf_counter) -> Result:
    """Runs all cases of the settings' suites. Ctrl-C ends it early: what was measured is returned.

    Raises:
        UsageError: there is no such model.
        MissingPackageError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingPackageError("the benchmarks need transformers: pip install 'ia3rt[bench]'")
    started = clock()
    wanted = {name: SUITES[name].wants(settings.device) for name in settings.suites}
    cases = cases_of(settings)
    with quiet(), Workshop(settings, CONTENDERS) as workshop:
        result = _empty(settings, workshop)
        result.not_run = {name: why for name, why in wanted.items() if why is not None}
        end = None if settings.effort.deadline is None else started + settings.effort.deadline
        for position, (suite, case) in enumerate(cases):
            progress(position, len(cases), f"{suite}: {case.name}")
            try:
                result.cases.append(run_case(suite, case, workshop, end, clock))
            except OutOfTimeError:
                result.not_run[f"{suite}: {case.name}"] = "the time of a quick run was up"
            except KeyboardInterrupt:
                for left_suite, left in cases[position:]:
                    result.not_run[f"{left_suite}: {left.name}"] = STOPPED
                break
            except Exception as error:  # out of memory, say: what else was measured must not be lost
                result.cases.append(_case_result(suite, case, "", [], Ways(failed={"the case": described(error)})))
    return result


def run_case(
    suite: str, case: Case, workshop: Workshop, end: float | None = None, clock: Clock = time.perf_counter
) -> CaseResult:
    """Runs one case.

    Raises:
        OutOfTimeError: it would not end before `end`.
    """
    if end is not None and clock() > end:
        raise OutOfTimeError
    made = case.ways(workshop, workshop.settings.contenders)
    drop_wrong(made, tolerance_of(workshop.settings.dtype))
    values = {name: way for name, way in made.ways.items() if isinstance(way, Value)}
    ways = {name: way for name, way in made.ways.items() if isinstance(way, Way)}
    reference = next((name for name in case.references if name in made.ways), "")
    if values:
        measurements = _read(values, reference)
    else:
        if reference:
            ways[CONTROL] = control_of(made, reference)
        effort = workshop.settings.effort
        if case.rounds is not None:
            fewer = {"least": min(case.rounds, effort.least), "most": min(case.rounds, effort.most)}
            effort = dataclasses.replace(effort, **fewer)
        with case.beside():
            measurements = measure(ways, reference, effort, workshop.settings.device, end, clock)
    return _case_result(suite, case, reference, measurements, made)


def control_of(made: Ways, reference: str) -> Way:
    """What is timed beside the reference and should take as long: its second model, or itself once more."""
    way = made.again(reference) if made.again is not None and reference in TWICE else made.ways[reference]
    assert isinstance(way, Way)
    return way


def _case_result(suite: str, case: Case, reference: str, measurements: list[Measurement], made: Ways) -> CaseResult:
    told = (suite, case.what, dict(case.parameters), case.name, reference, case.unit, case.work)
    control = next((measured for measured in measurements if measured.contender == CONTROL), None)
    contenders = [measured for measured in measurements if measured is not control]
    return CaseResult(*told, contenders, made.left_out, made.failed, control)


def drop_wrong(made: Ways, tolerance: float) -> None:
    """Moves the ways that raise, or whose result is not the first contender's, to `failed`: they are not timed."""
    first: tuple[str, Tensor] | None = None
    for name, way in list(made.ways.items()):
        if isinstance(way, Value) or way.result is None:
            continue
        try:
            result = way.result().detach().double().cpu()
        except Exception as error:  # as in by_subject
            made.failed[name] = described(error)
            del made.ways[name]
            continue
        first = first or (name, result)
        apart = distance(result, first[1])
        if not apart <= tolerance:
            made.failed[name] = f"another result than {first[0]}'s: it is {apart:.2g} of its norm away"
            del made.ways[name]


def measure(
    ways: Mapping[str, Way],
    reference: str,
    effort: Effort,
    device: torch.device,
    end: float | None = None,
    clock: Clock = time.perf_counter,
) -> list[Measurement]:
    """Warms the ways up until they settle, and then times them in turn.

    Raises:
        OutOfTimeError: the least number of rounds would not end before `end`.
    """
    if not ways:
        return []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    turns = dict.fromkeys(ways, 1)

    def repeated(name: str) -> Callable[[int], object]:
        def run(turn: int) -> object:
            first, own = turn * turns[name], 0.0
            for repeat in range(turns[name]):
                result = ways[name].run(first + repeat)
                if isinstance(result, Seconds):
                    own += result
            return Seconds(own) if own else None

        return run

    def in_time(rounds: int) -> Iterator[int]:
        # When the machine became slower than it was in the warm-up.
        begun = clock()
        for turn in range(rounds):
            late = end is not None and clock() > end
            if turn >= (FEWEST if late else effort.least) and (late or clock() - begun > 2 * effort.seconds):
                return
            yield turn

    def sample(rounds: Iterable[int]) -> dict[str, list[float]]:
        taken: dict[str, list[float]] = sample_interleaved(
            {name: repeated(name) for name in ways},
            rounds,
            before=lambda name: ways[name].before(turns[name]),
            after=lambda name: ways[name].after(),
            wait=wait,
            clock=clock,
        )
        return taken

    with _no_collection():
        settled, whole = warm_up(sample, clock)
        for name, seconds in settled.items():
            if ways[name].repeats and seconds < effort.sample:
                turns[name] = max(1, round(effort.sample / max(seconds, 1e-9)))
        # What a round will take: what it took, with the repeats, and with what is done between the measurements.
        expected = whole + sum((turns[name] - 1) * settled[name] for name in ways)
        if end is not None and clock() + effort.least * expected > end:
            raise OutOfTimeError
        rounds = min(effort.most, max(effort.least, int(effort.seconds / max(expected, 1e-9))))
        samples = sample(in_time(rounds))
    per_run = {name: [seconds / turns[name] for seconds in taken] for name, taken in samples.items()}
    return [
        Measurement.of(name, taken, per_run[reference] if name != reference else None, turns[name], ways[name].note)
        for name, taken in per_run.items()
    ]


def warm_up(
    sample: Callable[[range], dict[str, list[float]]], clock: Clock = time.perf_counter
) -> tuple[dict[str, float], float]:
    """Runs rounds until they no longer get faster.

    Returns:
        The seconds of each way in its fastest round, and those of the last round as a whole.
    """
    fastest: dict[str, float] = {}
    whole = 0.0
    for turn in range(WARM_UPS):
        start = clock()
        taken = {name: seconds[0] for name, seconds in sample(range(turn, turn + 1)).items()}
        whole = clock() - start
        settled = bool(fastest) and all(seconds >= SETTLED * fastest[name] for name, seconds in taken.items())
        fastest = {name: min(seconds, fastest.get(name, seconds)) for name, seconds in taken.items()}
        if settled:
            break
    return fastest, whole


def _read(values: Mapping[str, Value], reference: str) -> list[Measurement]:
    base = [values[reference].number] if reference else None
    return [Measurement.of(name, [value.number], base if name != reference else None) for name, value in values.items()]


def _empty(settings: Settings, workshop: Workshop) -> Result:
    return Result(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=shlex.join(["ia3rt", *sys.argv[1:]]),
        model=title_of(settings),
        device=str(settings.device),
        dtype=str(settings.dtype).removeprefix("torch."),
        adapter=workshop.adapters.numbers,
        contenders=list(settings.contenders),
        machine=machine(),
        versions=versions(),
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """A context in which Python does not collect garbage at a moment of its own choosing."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
