"""Writes the tables and plots of docs/combining.md from the study's CSV files."""

from __future__ import annotations

from pathlib import Path

from ia3rt.bench import markdown
from ia3rt.bench.study.plots import plots
from ia3rt.bench.study.tables import tables

_PLOTS = {
    "kept": "The share kept by each way, for two adapters and more, with intervals",
    "more": "The share kept by how many adapters are combined",
    "pairs": "What a pair loses by how far its adapters are from 1",
}
"""What each plot is, by its file's name."""


def write_page(file: Path, folder: Path) -> None:
    """Writes a page's tables, and its plots into the folder of its name beside it.

    Args:
        file: docs/combining.md.
        folder: a run's results.

    Raises:
        ValueError: the page lacks a place for a table.
    """
    for name, content in tables(folder).items():
        markdown.replace(file, name, content)
    for name, drawn in _PLOTS.items():
        markdown.replace(file, f"study plot of {name}", f"![{drawn}]({file.stem}/{name}.svg)")
    beside = file.with_suffix("")
    beside.mkdir(exist_ok=True)
    for name, drawn in plots(folder).items():
        (beside / name).write_bytes(drawn)
