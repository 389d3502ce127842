"""What `ia3rt bench` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from ia3rt.bench import readable
from ia3rt.bench.compare import Change
from ia3rt.bench.contenders.registry import OURS
from ia3rt.bench.result import CONTROL, NOISE, CaseResult, Result
from ia3rt.bench.runner import Progress
from ia3rt.bench.suites.registry import SUITES

WIDE = 110  # columns that a terminal needs to show all percentiles
STYLES = {"slower": "red", "faster": "green", "noise": "dim", "same": ""}


@contextmanager
def shown_progress(console: Console) -> Iterator[Progress]:
    """Shows a bar while cases run; it vanishes at the end."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("building the model", total=None)
        yield Progress(
            begins=lambda total: bar.update(task, total=total),
            case=lambda suite, name: bar.update(task, description=f"{suite}: {name}"),
            done=lambda _: bar.advance(task),
        )


def print_result(console: Console, result: Result) -> None:
    """Prints a table a suite, and what is missing in it."""
    where = ", ".join(result.machine["devices"]) if result.device.startswith("cuda") else result.machine["processor"]
    console.print(
        Text(
            f"{result.model}, {result.dtype} on {result.device} ({where}, {result.machine['cores']} cores, "
            f"{result.machine['torch_threads']} threads). An adapter is {result.adapter:,} numbers.",
            style="bold",
        )
    )
    for suite in dict.fromkeys(case.suite for case in result.cases):
        _print_suite(console, suite, [case for case in result.cases if case.suite == suite])
    for title, lines in (("Not run", _not_run(result)), ("Failed", result.failures)):
        for line in lines:
            console.print(Text(f"{title}: {line}", style="red" if title == "Failed" else "dim"))


def _print_suite(console: Console, suite: str, cases: Sequence[CaseResult]) -> None:
    table = Table(title=f"{suite}. {SUITES[suite].about}", title_justify="left", title_style="bold", box=box.ROUNDED)
    table.add_column("case")
    table.add_column("contender", no_wrap=True)
    shown = ("p20", "p50", "p80") if console.width >= WIDE else ("p50",)
    for title in (*shown, "rate", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    for case in cases:
        for position, measured in enumerate(case.measurements):
            ratio = readable.ratio(case, measured)
            table.add_row(
                Text(case.name if position == 0 else ""),
                Text(measured.contender, style="bold" if measured.contender in OURS else ""),
                *(readable.taken(case, getattr(measured.taken, percentile)) for percentile in shown),
                readable.rate(case, measured),
                Text(ratio, style="dim" if ratio in (readable.NOISY, readable.WITHIN) else ""),
            )
        if case.control is not None:
            times = (readable.taken(case, getattr(case.control.taken, percentile)) for percentile in shown)
            table.add_row("", CONTROL, *times, "", readable.control(case.control), style="dim")
        table.add_section()
    console.print(table)
    if any(measured.is_noise for case in cases for measured in case.measurements):
        console.print(Text(f"  noise: the ratio may be off by over {NOISE:.0%} by chance.", style="dim"))
    if any(case.control for case in cases):
        console.print(Text(f"  {readable.CONTROL_IS}", style="dim"))
    for line in left_out(cases):
        console.print(Text(f"  {line}", style="dim"))


def left_out(cases: Iterable[CaseResult]) -> list[str]:
    """A line for each reason why a contender is missing, with the cases it is missing in unless it is in all."""
    cases = list(cases)
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for contender, why in case.left_out.items():
            reasons.setdefault((contender, why), []).append(case.name)
    return [
        f"without {contender}{'' if len(names) == len(cases) else ' in ' + '; '.join(names)}: {why}"
        for (contender, why), names in reasons.items()
    ]


def _not_run(result: Result) -> list[str]:
    return [f"{name}: {why}" for name, why in result.not_run.items()]


def print_changes(console: Console, changes: Sequence[Change]) -> None:
    """Prints what `compare` found."""
    table = Table(title="Ratios, before and after", title_justify="left", title_style="bold", box=box.ROUNDED)
    table.add_column("case")
    table.add_column("contender", no_wrap=True)
    for title in ("before", "after", "verdict"):
        table.add_column(title, justify="right", no_wrap=True)
    for change in changes:
        ratios = ("–", "–") if change.verdict == "noise" else (f"{change.before:.3g} ×", f"{change.after:.3g} ×")
        verdict = Text(change.verdict, style=STYLES[change.verdict])
        table.add_row(Text(change.case), f"{change.contender} / {change.reference}", *ratios, verdict)
    console.print(table)
