"""Writes the tables and plots of docs/performance.md: those that are counted, and those of measured runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ia3rt.bench import markdown, readable
from ia3rt.bench.machine import machine, versions
from ia3rt.bench.profile import above, memory, scaling
from ia3rt.bench.profile.counted import WEARINGS, Counts, Wearing, count_layers
from ia3rt.bench.profile.launches import launches
from ia3rt.bench.report import svg
from ia3rt.bench.result import CaseResult, Result
from ia3rt.bench.suites.case import UNADAPTED_FIRST
from ia3rt.bench.suites.registry import SUITES

PLOTTED = ("forward", "mixed", "combine", "scale")
"""The suites of which there is a plot."""


def counted_table(launched: dict[str, int] | None = None) -> str:
    """A row for what is worn: a layer's counts in a decoding step in float32, and its launches as Triton's backend."""
    counts = count_layers()
    launched = launches() if launched is None else launched

    def row(wearing: Wearing, made: Counts) -> tuple[str, ...]:
        operations = sum(made.operations.values())
        base = sum(counts[Wearing("base", by_row=wearing.by_row)].operations.values())
        ours = launched.get(str(wearing))
        on_gpu = ours if wearing.contender == "ia3rt" else operations
        return (
            str(wearing),
            f"{operations} ({operations - base:+})",
            str(made.modules),
            str(made.calls),
            f"{made.bytes / 1000:,.0f}",
            "" if on_gpu is None else f"{on_gpu} ({on_gpu - base:+})",
        )

    header = ("a layer, decoding", "operations", "module calls", "Python calls", "kB allocated", "GPU kernels")
    text: str = markdown.table(header, [row(wearing, counts[wearing]) for wearing in WEARINGS])
    return text


def memory_table() -> str:
    """A row for a model."""
    header = ("model", "numbers", "MB, float32", "MB, bfloat16", f"MB, LoRA of rank {memory.RANK}, bfloat16", "LoRA")
    text: str = markdown.table(header, memory.table_rows())
    return text


def scaling_table() -> str:
    """A row for a site and a dtype."""
    rows = [(cost.site, cost.dtype, f"{cost.hot:.1f}", f"{cost.cold:.1f}") for cost in scaling.costs()]
    text: str = markdown.table(("site", "dtype of the model", "µs in the cache", "µs after other work"), rows)
    return text


def above_tables() -> str:
    """For each dtype, the operators that differ most from the base model's."""
    parts = []
    for dtype in (torch.float32, torch.bfloat16):
        rows = above.table_rows(above.by_operator(dtype))
        header = (f"µs a step, {str(dtype).removeprefix('torch.')}", "base", "PEFT, above", "ia3rt, above")
        parts.append(markdown.table(header, rows))
    return "\n\n".join(parts)


def machine_line() -> str:
    """What this was measured on."""
    return _machine_line(machine(), versions(), "")


def measured_tables(results: Sequence[Result]) -> str:
    """For each run its machine, and a row for each case: the contenders' ratios to the reference, and the control's."""
    parts = []
    for result in results:
        command = readable.command(result.command)
        parts.append(_machine_line(result.machine, result.versions, f"{result.model}, {result.dtype}: `{command}`"))
        reference = next(name for name in UNADAPTED_FIRST if name in result.contenders)
        contenders = [name for name in result.contenders if name != reference]
        rows = [
            (f"{case.suite}: {case.name}", *(_ratio(case, name) for name in contenders), _control(case))
            for case in result.cases
            if case.reference == reference
        ]
        parts.append(markdown.table((f"× {reference}", *contenders, "control"), rows))
    return "\n\n".join(parts)


def write_counted(file: Path) -> None:
    """Writes what is counted or computed; the same on every machine."""
    markdown.replace(file, "counted", counted_table())
    markdown.replace(file, "memory", memory_table())


def write_timed(file: Path) -> None:
    """Writes what is timed by a profile on this machine."""
    markdown.replace(file, "profiled on", machine_line())
    markdown.replace(file, "scaling", scaling_table())
    markdown.replace(file, "above base", above_tables())


def write_measured(file: Path, results: Sequence[Result]) -> None:
    """Writes the tables of runs of `ia3rt bench`, and beside `file` plots of PLOTTED: of the first run with each."""
    markdown.replace(file, "measured", measured_tables(results))
    folder = file.with_suffix("")
    folder.mkdir(exist_ok=True)
    plots: dict[str, bytes] = {}
    for result in results:
        for name in PLOTTED:
            cases = [case for case in result.cases if case.suite == name]
            drawn = svg(cases, SUITES[name].x) if len(cases) > 1 else b""
            if drawn:
                plots.setdefault(f"{name}-{result.model.partition(',')[0]}-{result.dtype}.svg", drawn)
    for file_name, drawn in plots.items():
        (folder / file_name).write_bytes(drawn)


def _ratio(case: CaseResult, name: str) -> str:
    for measured in case.measurements:
        if measured.contender == name:
            shown: str = readable.cell(measured, case.control)
            return shown
    return ""


def _control(case: CaseResult) -> str:
    return (
        "" if case.control is None or case.control.ratio is None else readable.control(case.control).replace(" ×", "")
    )


def _machine_line(on: dict[str, Any], with_: dict[str, Any], what: str) -> str:
    where = f"{on['processor']}, {on['cores']} cores, {on['torch_threads']} threads; {readable.packages(with_)}."
    return f"{what}\\\n{where}" if what else where
