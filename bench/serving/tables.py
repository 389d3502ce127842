"""What a run of the servers' benchmark tells: in the terminal and in docs/serving.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, JustifyMethod
from rich.table import Table

from ia3rt.bench import markdown, readable
from ia3rt.bench.result import CONTROL
from ia3rt.bench.serving.run import NOTES, Timed, read

FIGURES = {"tokens_per_second": "tokens/s", "first": "first token", "between": "between tokens"}
HEADER = ("server", *(part for title in FIGURES.values() for part in (title, "× base")))


def rows(one: Timed) -> list[tuple[str, ...]]:
    """A row for each server of a case; of tokens a second more is better, of the times less."""
    made = []
    controls = {figure: one.measured(CONTROL, figure) for figure in FIGURES}
    for name in one.rounds:
        cells = []
        for figure, control in controls.items():
            measured = one.measured(name, figure)
            value = measured.taken.p50
            cells.append(f"{value:,.1f}" if figure == "tokens_per_second" else readable.seconds(value))
            cells.append(readable.control(measured) if name == CONTROL else readable.cell(measured, control))
        made.append((name, *cells))
    return made


def terminal_tables(timed: Sequence[Timed]) -> Group:
    """A table for each case, for a terminal of 80 columns."""
    made = []
    for one in timed:
        table = Table(title=str(one.case), title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0))
        for title in HEADER:
            width = {"server": 13, "× base": 12}.get(title, 7)  # a title of two words takes two lines
            justify: JustifyMethod = "left" if title == "server" else "right"
            table.add_column(title, justify=justify, min_width=width, max_width=max(width, 8))
        for row in rows(one):
            cells = (cell.replace(" (", "\n(") for cell in row)  # what a control may be off by, on a line of its own
            table.add_row(*cells, style="dim" if row[0] == CONTROL else "")
        made.append(table)
    return Group(*made)


def notes(timed: Sequence[Timed]) -> list[str]:
    """What a reader has to know about the servers."""
    shown = dict.fromkeys(name for one in timed for name in one.rounds)
    return [f"{name}: {NOTES[name]}." for name in shown if name in NOTES] + [
        "control: the base server once more; in brackets: how far its ratio is from 1, or may be by chance. ° marks "
        "ratios no further from 1 than that, or than chance may have moved them; noise: off by more than 5 % by chance."
    ]


def write(file: Path, results: Sequence[Path]) -> None:
    """Writes runs' tables into docs/serving.md."""
    markdown.replace(file, "served", "\n\n".join(_section(*read(result)) for result in results))


def _section(plain: Mapping[str, Any], timed: Sequence[Timed]) -> str:
    head = readable.ran(f"{plain['model']}: `{plain['command']}`", plain["machine"], plain["versions"])
    lines = [(f"{one.case}: {name}", *cells) for one in timed for name, *cells in rows(one)]
    return "\n\n".join([head, markdown.table(("case: server", *HEADER[1:]), lines), " ".join(notes(timed))])
