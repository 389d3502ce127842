"""The page's plots, from the study's CSV files alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ia3rt.bench.study.cells import BASE, JOINT, OWN, read_table
from ia3rt.bench.study.methods import IN_A_ROW
from ia3rt.bench.study.tables import TITLES, compared, rows_of, sizes_of

Row = Mapping[str, str]

_COLORS = ("#d62728", "#1f77b4", "#7f7f7f")
_COLOR_OF = {
    OWN: "black",
    "product": "#d62728",
    "delta": "#1f77b4",
    "linear": "#7f7f7f",
    "power": "#2ca02c",
    BASE: "#bbbbbb",
}
_WORDS = {OWN: "routing (each row its own)", JOINT: "one adapter trained on all", BASE: "no adapter"}


def plots(folder: Path) -> dict[str, bytes]:
    """SVG files by name: the shares kept, how they fall with more adapters, and what a pair's likeness says."""
    return {"kept.svg": _kept(folder), "more.svg": _more(folder), "pairs.svg": _pairs(folder)}


def _kept(folder: Path) -> bytes:
    """A dot and an interval for each way and size, the best on top; routing is the line at 100 %."""
    by_model = rows_of(folder, "methods")
    figure, axes = _panels(len(by_model), 5.4, 5.2)
    for axis, (model, rows) in zip(axes, by_model.items(), strict=True):
        sizes = sizes_of(rows)
        first = [row for row in rows if int(row["size"]) == sizes[0] and row["method"] != OWN and row["kept"]]
        names = [row["method"] for row in sorted(first, key=lambda row: float(row["kept"]))]
        for place, size in enumerate(sizes):
            found = compared(rows, size)
            shown = [(at, found[name]) for at, name in enumerate(names) if name in found and found[name]["kept"]]
            heights = [at + 0.22 * (1 - place) for at, _ in shown]
            _dots(axis, [row for _, row in shown], heights, _COLORS[place % 3], f"{size} adapters", across=True)
        axis.axvline(100, color="black", linewidth=1)
        axis.set_yticks(range(len(names)), [_WORDS.get(name, name) for name in names], fontsize=8)
        axis.set_xlabel("share kept of what each task's own adapter has, %", fontsize=8)
        _titled(axis, model)
    return _svg(figure)


def _more(folder: Path) -> bytes:
    """The share kept by how many adapters are combined, of a few ways."""
    by_model = rows_of(folder, "methods")
    figure, axes = _panels(len(by_model), 4.2, 3.4)
    for axis, (model, rows) in zip(axes, by_model.items(), strict=True):
        shown = (OWN, *IN_A_ROW, "power", BASE)
        for name in shown:
            color = _COLOR_OF[name]
            found = [row for row in rows if row["method"] == name and row["kept"]]
            found.sort(key=lambda row: int(row["size"]))
            xs = [float(row["size"]) for row in found]
            axis.plot(xs, [100 * float(row["kept"]) for row in found], color=color, linewidth=1)
            _dots(axis, found, xs, color, _WORDS.get(name, name), across=False)
        axis.set_xticks(sizes_of(rows))
        axis.set_xlabel("adapters combined", fontsize=8)
        axis.set_ylabel("share kept, %", fontsize=8)
        _titled(axis, model)
    return _svg(figure)


def _pairs(folder: Path) -> bytes:
    """What a pair loses, by how far its adapters are from 1."""
    by_model: dict[str, list[Row]] = {}
    for row in read_table(folder / "pairs.csv"):
        by_model.setdefault(row["model"], []).append(row)
    figure, axes = _panels(len(by_model), 4.2, 3.4)
    for axis, (model, rows) in zip(axes, by_model.items(), strict=True):
        for name in ("product", "linear"):
            xs = [float(row["distance"]) for row in rows]
            ys = [100 * float(row[f"loss_of_{name}"]) for row in rows]
            axis.scatter(xs, ys, s=18, color=_COLOR_OF[name], label=name)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_xlabel("mean |l − 1| of both", fontsize=8)
        axis.set_ylabel("points lost to routing", fontsize=8)
        _titled(axis, model)
    return _svg(figure)


def _dots(axis: Any, rows: Sequence[Row], places: Sequence[float], color: str, label: str, across: bool) -> None:
    values = [100 * float(row["kept"]) for row in rows]
    below = [value - 100 * float(row["kept_low"]) for value, row in zip(values, rows, strict=True)]
    above = [100 * float(row["kept_high"]) - value for value, row in zip(values, rows, strict=True)]
    spread = [[max(0.0, each) for each in side] for side in (below, above)]
    style = dict(fmt="o", markersize=3.5, linewidth=1, color=color, label=label)
    if across:
        axis.errorbar(values, places, xerr=spread, **style)
    else:
        axis.errorbar(places, values, yerr=spread, **style)


def _panels(count: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False).flatten()


def _titled(axis: Any, model: str) -> None:
    axis.set_title(TITLES.get(model, model), fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def _svg(figure: Any) -> bytes:
    import matplotlib

    written = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ia3rt"}):  # the same file for the same numbers
        figure.savefig(written, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return written.getvalue()
