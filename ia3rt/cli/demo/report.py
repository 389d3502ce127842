"""What the demo prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ia3rt.adapters.mix import Mix
    from ia3rt.cli.demo.inputs import Row, Task

MAX_WIDTH = 100
_NARROW = 90
_CONFIDENCE = 1.96  # standard errors on either side: 95% of a normal distribution


def print_note(console: Console, text: str | Text) -> None:
    """Prints a sentence under a table, no wider than the tables are."""
    console.print(
        Padding(Text(text, style="dim") if isinstance(text, str) else text, (0, 0, 1, 1)), width=_width(console)
    )


def print_batch(console: Console, rows: Sequence[Row], outputs: Sequence[str]) -> None:
    """Prints a mixed batch: what each row wears, its prompt, its output, and the true label where there is one."""
    labelled = any(row.label for row in rows)
    table = _table(f"One batch, {len(rows)} rows, each wearing its own mix of adapters", "wears", "prompt", "output")
    if labelled:
        table.add_column("truth", no_wrap=True)
    worn = [str(row.mix) for row in rows]
    words = [clip(output, 12 if _width(console) < _NARROW else 18) for output in outputs]
    truths = [_truth(row, output) for row, output in zip(rows, outputs, strict=True)]
    taken = max(map(len, worn)) + max(map(len, words)) + max(map(len, truths)) + 3 * len(table.columns) + 1
    room = _width(console) - taken
    if room < 30:  # then in two lines or three
        room = 45
    for row, mix, word, truth in zip(rows, worn, words, truths, strict=True):
        table.add_row(Text(mix), Text(shorten(row.prompt, room)), Text(word), *([Text(truth)] if labelled else []))
    console.print(table)


def print_accuracy(
    console: Console, mixes: Sequence[Mix], tasks: Sequence[Task], shares: Sequence[Sequence[float]]
) -> None:
    """Prints the accuracy of each mix (outer) on each task (inner), in [0, 1]; the best of each task stands out."""
    table = _table("Accuracy on held-out examples", "wears")
    for task in tasks:
        table.add_column(f"{task.name}, n = {len(task.examples)}", justify="right", no_wrap=True)
    best = [max(column) for column in zip(*shares, strict=True)]
    for mix, row in zip(mixes, shares, strict=True):
        table.add_row(Text(str(mix)), *(_share(share, share == top) for share, top in zip(row, best, strict=True)))
    console.print(table)
    print_note(console, noise(min(len(task.examples) for task in tasks)))


def noise(n: int) -> str:
    """The sentence that says how uncertain an accuracy measured on n examples is."""
    even, high = (100 * _CONFIDENCE * math.sqrt(share * (1 - share) / n) for share in (0.5, 0.9))
    return (
        f"★ the best. The likelier of the two labels counts as the answer, even where the model would write neither. "
        f"The 95% interval at n = {n} is ±{even:.0f} points around 50% and ±{high:.0f} around 90%: smaller "
        "differences may be noise."
    )


def print_switching(console: Console, seconds: Mapping[str, float | None], ours: str, rounds: int) -> None:
    """Prints what each way of switching costs, in microseconds and as a multiple of `ours`.

    Args:
        console: where to print.
        seconds: medians, by the way's name; None where its package is not installed.
        ours: the way that the others are compared with.
        rounds: how often each was timed.
    """
    table = _table("What switching to another adapter costs", "how")
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("against ia3rt", justify="right", no_wrap=True)
    reference = seconds[ours]
    for name, taken in seconds.items():
        if taken is None or reference is None:
            table.add_row(name, "not installed", "pip install peft")
        else:
            table.add_row(name, f"{taken * 1e6:,.0f} µs", f"{times(taken / reference)} ×")
    console.print(table)
    print_note(console, f"Medians of {rounds} switches each, taken in turns; only the switch is timed.")


def times(ratio: float) -> str:
    """A ratio as a person reads it: with one decimal below ten, with none above."""
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:,.0f}"


def print_check(console: Console, exact: bool) -> None:
    """Prints whether the unpatched model computes what it did before."""
    if exact:
        console.print(Text("✓ after rt.unpatch() the logits are the base model's, bit for bit", style="green"))
    else:
        console.print(Text("✗ after rt.unpatch() the logits differ from the base model's", style="bold red"))


def clip(text: str, width: int) -> str:
    """The beginning of the text, in one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}…"


def shorten(text: str, width: int) -> str:
    """The text in one line of at most `width` characters, its middle left out; where it ends, the model goes on."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    last = text.strip().rpartition("\n")[2].strip()
    tail = last[-(width * 2 // 3) :]
    return f"{line[: width - len(tail) - 3].rstrip()} … {tail}"


def _width(console: Console) -> int:
    return min(console.width, MAX_WIDTH)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.ROUNDED, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _truth(row: Row, output: str) -> str:
    if row.label is None:
        return ""
    right = output.strip().startswith(row.label.strip())
    return f"{row.label.strip()} {'✓' if right else '✗'}"


def _share(share: float, best: bool) -> Text:
    return Text(f"★ {share:.1%}" if best else f"{share:.1%}", style="bold green" if best else "")
