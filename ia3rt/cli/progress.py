"""How a command shows that it is busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def busy(console: Console, text: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Shows a progress bar, which vanishes at the end, or a spinner where `total` is None; yields what advances it."""
    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()]
    if total is None:
        del columns[2]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda: progress.advance(task)
