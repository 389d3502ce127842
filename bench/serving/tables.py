"""What a run of the servers' benchmark tells: in the terminal and in docs/serving.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ia3rt.bench import markdown, readable
from ia3rt.bench.serving.run import BASE, FIGURES, NOTES, Timed, read

TITLES = ("tokens/s", "first token", "between tokens")
HEADER = ("case", "server", *(part for title in TITLES for part in (title, "× base")))


def rows(timed: Sequence[Timed]) -> list[tuple[str, ...]]:
    """A row for each case and server; ratios are medians of the rounds' own, more tokens and less time are better."""
    made = []
    for one in timed:
        for position, name in enumerate(one.rounds):
            cells = []
            for figure in FIGURES:
                value = one.median(name, figure)
                shown = f"{value:,.1f}" if figure == "tokens_per_second" else readable.seconds(value)
                cells += [shown, "" if name == BASE else readable.of_one(one.ratio(name, figure))]
            made.append((str(one.case) if position == 0 else "", name, *cells))
    return made


def terminal_table(timed: Sequence[Timed]) -> Table:
    """The table for a terminal."""
    table = Table(box=None, header_style="bold")
    for title in HEADER:
        table.add_column(title, justify="left" if title in ("case", "server") else "right")
    for row in rows(timed):
        table.add_row(*row, style="dim" if row[1] == "control" else "")
    return table


def notes(timed: Sequence[Timed]) -> list[str]:
    """What a reader has to know about the servers."""
    shown = dict.fromkeys(name for one in timed for name in one.rounds)
    return [f"{name}: {NOTES[name]}." for name in shown if name in NOTES] + [
        "control: the base server once more; how far it is from 1 is how far a ratio may be by chance."
    ]


def write(file: Path, results: Sequence[Path]) -> None:
    """Writes runs' tables into docs/serving.md."""
    markdown.replace(file, "served", "\n\n".join(_section(*read(result)) for result in results))


def _section(plain: Mapping[str, Any], timed: Sequence[Timed]) -> str:
    on, with_ = plain["machine"], plain["versions"]
    head = f"{plain['model']}: `{readable.command(plain['command'])}`\\\n"
    head += f"{on['processor']}, {on['cores']} cores; {readable.packages(with_)}."
    return "\n\n".join([head, markdown.table(HEADER, rows(timed)), " ".join(notes(timed))])
