"""What `ia3rt bench` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.measure import Measurement as Space
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ia3rt.bench import readable
from ia3rt.bench.compare import Change
from ia3rt.bench.contenders.registry import OURS
from ia3rt.bench.result import NOISE, CaseResult, Measurement, Result
from ia3rt.bench.runner import Shown
from ia3rt.bench.suites.registry import SUITES

UNBOUNDED = 1_000  # columns that no table takes
WIDE = 110  # columns that a terminal needs to show all percentiles
STYLES = {"slower": "red", "failed": "red", "missing": "red", "faster": "green", "same": ""}


@contextmanager
def shown_progress(console: Console) -> Iterator[Shown]:
    """Shows a bar while cases run; it vanishes at the end."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("building the model", total=None)
        yield lambda done, total, case: bar.update(task, completed=done, total=total, description=case)


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
    for name, why in result.not_run.items():
        console.print(Text(f"Not run: {name}: {why}", style="dim"))
    for line in result.failures:
        console.print(Text(f"Failed: {line}", style="red"))


def _print_suite(console: Console, suite: str, cases: Sequence[CaseResult]) -> None:
    hidden = ("rounds",) if console.width >= WIDE else ("rounds", "p20", "p80")
    table = _suite_table(suite, cases, hidden)
    if _least(console, table) > console.width:
        table = _suite_table(suite, cases, (*hidden, "rate"))
    _print_whole(console, table)
    if any(measured.is_noise for case in cases for measured in case.measurements):
        console.print(Text(f"  noise: the ratio may be off by over {NOISE:.0%} by chance.", style="dim"))
    if any(case.control for case in cases):
        console.print(Text(f"  {readable.CONTROL_IS}", style="dim"))
    for line in left_out(cases):
        console.print(Text(f"  {line}", style="dim"))


def _suite_table(suite: str, cases: Sequence[CaseResult], hidden: Sequence[str]) -> Table:
    table = Table(title=f"{suite}. {SUITES[suite].about}", title_justify="left", title_style="bold", box=box.ROUNDED)
    columns = [column for column in readable.COLUMNS if column not in hidden]
    for column in columns:
        left = column in ("case", "contender")
        table.add_column(column, justify="left" if left else "right", no_wrap=column not in ("case", "ratio"))
    for case in cases:
        for measured in case.all_measured:
            row = readable.row(case, measured)
            cells = {column: Text(row[column]) for column in columns}
            cells["contender"].stylize("bold" if measured.contender in OURS else "")
            cells["ratio"].stylize("dim" if row["ratio"] in (readable.NOISY, readable.WITHIN) else "")
            table.add_row(*cells.values(), style="dim" if measured is case.control else "")
        table.add_section()
    return table


def _print_whole(console: Console, table: Table) -> None:
    """Prints a table that nothing is cut off of: a terminal that is too narrow breaks its lines."""
    least = _least(console, table)
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


def _least(console: Console, table: Table) -> int:
    """Holds columns to whole words, or to whole cells where these do not wrap; returns what the table needs then."""
    wide = console.options.update(width=UNBOUNDED)
    for column in table.columns:
        spaces = [Space.get(console, wide, each) for each in (column.header, *column.cells)]
        column.min_width = max(space.maximum if column.no_wrap else space.minimum for space in spaces)
    least: int = Space.get(console, wide, table).minimum
    return least


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


def print_changes(console: Console, changes: Sequence[Change]) -> None:
    """Prints what `compare` found."""
    table = Table(title="Ratios, before and after", title_justify="left", title_style="bold", box=box.ROUNDED)
    table.add_column("case")
    table.add_column("contender", no_wrap=True)
    for title in ("before", "after", "verdict"):
        table.add_column(title, justify="right", no_wrap=True)
    for change in changes:
        ratios = _ratio(change.before), _ratio(change.after)
        verdict = Text(change.verdict, style=STYLES.get(change.verdict, "dim"))
        table.add_row(Text(change.case), f"{change.contender} / {change.reference}", *ratios, verdict)
    _print_whole(console, table)


def _ratio(measured: Measurement | None) -> str:
    """A ratio's median; of noise, which has none to tell, p20 … p80."""
    if measured is None or measured.ratio is None:
        return "–"
    ratio = measured.ratio
    return f"{ratio.p20:.3g} … {ratio.p80:.3g} ×" if measured.is_noise else f"{ratio.p50:.3g} ×"
