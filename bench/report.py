"""The HTML report: one file that opens offline, with its plots inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ia3rt.bench import readable
from ia3rt.bench.result import NOISE, CaseResult, Result
from ia3rt.bench.suites.registry import SUITES
from ia3rt.bench.terminal import left_out

COLORS = {
    "base": "#7f7f7f",
    "base-compiled": "#b5b5b5",
    "merged": "#b8860b",
    "peft": "#1f77b4",
    "peft-compiled": "#7fb2dd",
    "adapterhub": "#9467bd",
    "ia3rt": "#d62728",
    "ia3rt-compiled": "#ff9a8b",
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin-top: 2.5em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; font-size: 0.9em }
th, td { padding: 0.2em 0.7em; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap }
th { color: #555; font-weight: 600 }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left } /* the case and the contender */
tr.first td { border-top: 1px solid #bbb } tr.ours td { font-weight: 600 } tr.control td { color: #777 }
.dim { color: #666; font-size: 0.9em }
.failed { color: #b00020 } img { max-width: 100% } dl { display: grid; grid-template-columns: 9em 1fr; gap: 0.1em 1em }
dt { color: #555 } dd { margin: 0 } @media (max-width: 45em) { table { display: block; overflow-x: auto } }
"""


def write_html(result: Result, file: Path) -> None:
    """Writes the report of a run. Needs matplotlib."""
    file.write_text("\n".join(_document(result)), "utf-8")


def _document(result: Result) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>ia3rt bench: {_text(result.model)}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>ia3rt bench: {_text(result.model)}</h1>"
    yield _facts(result)
    yield (
        '<p class="dim">All contenders of a case are timed in turn, round after round, in an order drawn anew each '
        "time. A time is the median of all rounds, with its 20th and 80th percentile. A ratio is the median of the "
        "ratios to the reference, each to the reference's time in the same round: below 1 is faster. Where it may "
        f"be off by more than {NOISE:.0%} by chance, it is noise, and is not shown. "
        f"{_text(readable.CONTROL_IS)} Contenders that should compute the same were compared first; one with another "
        "result is not timed.</p>"
    )
    for line in result.failures:
        yield f'<p class="failed">Failed: {_text(line)}</p>'
    for name in dict.fromkeys(case.suite for case in result.cases):
        cases = [case for case in result.cases if case.suite == name]
        yield f'<h2 id="{name}">{name}</h2><p>{_text(SUITES[name].about)}</p>'
        if plots := svg(cases, SUITES[name].x):
            alternative = f"{name}: plots of the table below"
            yield f'<img alt="{alternative}" src="data:image/svg+xml;base64,{base64.b64encode(plots).decode()}">'
        yield from _table(cases)
        for line in left_out(cases):
            yield f'<p class="dim">{_text(line)}</p>'
    if result.not_run:
        yield "<h2>Not run</h2><ul>"
        yield from (f"<li>{_text(name)}: {_text(why)}</li>" for name, why in result.not_run.items())
        yield "</ul>"
    yield "</body></html>"


def _facts(result: Result) -> str:
    machine, memory = result.machine, result.machine["memory_bytes"]
    facts = {
        "date": result.date,
        "command": result.command,
        "computed": f"{result.dtype} on {result.device}",
        "adapter": f"{result.adapter:,} numbers",
        "processor": f"{machine['processor']}, {machine['cores']} cores, torch used {machine['torch_threads']} threads",
        "memory": "unknown" if memory is None else readable.size(memory),
        "GPUs": ", ".join(machine["devices"]) or "none",
        "load before": machine["load_average"],
        "system": machine["platform"],
        "versions": ", ".join(f"{name} {version or '–'}" for name, version in result.versions.items()),
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts.items()) + "</dl>"


def _table(cases: Sequence[CaseResult]) -> Iterator[str]:
    notes = list(dict.fromkeys(measured.note for case in cases for measured in case.measurements if measured.note))
    titles = "".join(f"<th>{column}</th>" for column in readable.COLUMNS)
    yield f"<table><tr>{titles}</tr>"
    for case in cases:
        for measured in case.all_measured:
            row = {column: _text(shown) for column, shown in readable.row(case, measured).items()}
            classes = ["first"] * (row["case"] != "") + ["ours"] * measured.contender.startswith("ia3rt")
            if measured is case.control:
                classes = ["control"]
            elif measured.note:
                row["contender"] += f" <sup>{notes.index(measured.note) + 1}</sup>"
            yield f'<tr class="{" ".join(classes)}">' + "".join(f"<td>{cell}</td>" for cell in row.values()) + "</tr>"
    yield "</table>"
    for number, note in enumerate(notes, 1):
        yield f'<p class="dim"><sup>{number}</sup> {_text(note)}</p>'
    for case in cases:
        for measured in case.measurements:
            if measured.is_noise:
                why = f"{case.name}, {measured.contender}: {readable.noise_reason(measured)}"
                yield f'<p class="dim">noise: {_text(why)}</p>'


def svg(cases: Sequence[CaseResult], x: str) -> bytes:
    """The plots of a suite's cases: a panel for each thing done, a line or bar for each contender. Or nothing."""
    from matplotlib.figure import Figure

    panels = _panels([case for case in cases if case.measurements], x)
    if not panels:
        return b""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, shown) in zip(axes, panels.items(), strict=False):
        axis.set_title(title, fontsize=10)
        (_bars if len(shown) == 1 else _lines)(axis, shown, x)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    written = io.BytesIO()
    figure.savefig(written, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return written.getvalue()


def _panels(cases: Sequence[CaseResult], x: str) -> dict[str, list[CaseResult]]:
    """Cases by what stays the same in them while `x` grows."""
    panels: dict[str, list[CaseResult]] = {}
    for case in cases:
        fixed = [f"{name}={value}" for name, value in case.parameters.items() if name != x]
        panels.setdefault(" ".join([case.what, *fixed]), []).append(case)
    return {
        title if len(shown) > 1 else shown[0].name: sorted(shown, key=lambda case: case.parameters[x])
        for title, shown in panels.items()
    }


def _bars(axis: Any, cases: Sequence[CaseResult], _: str) -> None:
    (case,) = cases
    unit, factor = _unit(cases)
    names = [measured.contender for measured in case.measurements][::-1]
    for position, measured in enumerate(reversed(case.measurements)):
        taken = measured.taken
        error = [[factor * (taken.p50 - taken.p20)], [factor * (taken.p80 - taken.p50)]]
        color = _color(measured.contender, names)
        axis.barh(position, factor * taken.p50, color=color, xerr=error, error_kw=dict(lw=1, capsize=2, ecolor="#444"))
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel(unit, fontsize=9)
    axis.set_xlim(left=0)


def _lines(axis: Any, cases: Sequence[CaseResult], x: str) -> None:
    unit, factor = _unit(cases)
    names = list(dict.fromkeys(measured.contender for case in cases for measured in case.measurements))
    for name in names:
        points = [(case.parameters[x], m.taken) for case in cases for m in case.measurements if m.contender == name]
        where = [point for point, _ in points]
        color = _color(name, names)
        axis.plot(where, [factor * taken.p50 for _, taken in points], "o-", color=color, label=name, ms=3, lw=1.3)
        low, high = ([factor * getattr(taken, p) for _, taken in points] for p in ("p20", "p80"))
        axis.fill_between(where, low, high, color=color, alpha=0.15, lw=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = sorted({int(case.parameters[x]) for case in cases})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    _plain_ticks(axis)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(unit, fontsize=9)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, frameon=False)


def _plain_ticks(axis: Any) -> None:
    """Labels the logarithmic axis with numbers at 1, 2 and 5, not with powers of ten that may lie outside of it."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _unit(cases: Sequence[CaseResult]) -> tuple[str, float]:
    """The unit that the smallest number of a panel is at least about one of, and how many make a second or byte."""
    least = min(measured.taken.p50 for case in cases for measured in case.measurements)
    if cases[0].unit == "bytes":
        return ("MB", 1e-6) if least >= 1e6 else ("kB", 1e-3)
    return ("s", 1.0) if least >= 1 else ("ms", 1e3) if least >= 1e-3 else ("µs", 1e6)


def _color(contender: str, names: Sequence[str]) -> str:
    """A contender's own; for the kernels' ways matplotlib's, in turn."""
    return COLORS.get(contender) or f"C{list(names).index(contender)}"


def _text(value: object) -> str:
    return html.escape(str(value))
