"""Writes the tables and plots of docs/performance.md: those that are counted, and those of measured runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ia3rt.bench import markdown, readable
from ia3rt.bench.interleaved import Timing
from ia3rt.bench.launches.compiled_calls import CALLS, LAYERS, ROUNDS, call_times
from ia3rt.bench.launches.measured import UNIT, HostTime, host_times
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


def write_counted(file: Path) -> None:
    """Writes what is counted or computed; the same on every machine."""
    markdown.check(file, "counted", "memory")
    markdown.replace(file, "counted", counted_table(launches()))
    header = ("model", "numbers", "MB, float32", "MB, bfloat16", f"MB, LoRA of rank {memory.RANK}, bfloat16", "LoRA")
    markdown.replace(file, "memory", markdown.table(header, memory.table_rows()))


def counted_table(launched: dict[str, int]) -> str:
    """A row for what is worn: a layer's counts in a decoding step in float32, and its launches as Triton's backend."""
    counts = count_layers()

    def row(wearing: Wearing, made: Counts) -> tuple[str, ...]:
        operations = made.operations.total()
        base = counts[Wearing("base", by_row=wearing.by_row)].operations.total()
        on_gpu = launched.get(str(wearing)) if wearing.contender == "ia3rt" else operations
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


def write_timed(file: Path) -> None:
    """Writes what is timed by a profile on this machine."""
    markdown.check(file, "profiled on", "scaling", "above base")
    markdown.replace(file, "profiled on", readable.ran("", machine(), versions()))
    header = ("site", "dtype of the model", "µs in the cache", "µs after other work")
    rows = [(cost.site, cost.dtype, f"{cost.hot:.1f}", f"{cost.cold:.1f}") for cost in scaling.costs()]
    markdown.replace(file, "scaling", markdown.table(header, rows))
    tables = []
    for dtype in (torch.float32, torch.bfloat16):
        header = (f"µs a step, {str(dtype).removeprefix('torch.')}", "base", "PEFT, above", "ia3rt, above")
        tables.append(markdown.table(header, above.table_rows(above.by_operator(dtype))))
    markdown.replace(file, "above base", "\n\n".join(tables))


def write_measured(file: Path, results: Sequence[Result]) -> None:
    """Writes the tables of runs of `ia3rt bench`, and beside `file` plots of PLOTTED: of the first run with each."""
    markdown.replace(file, "measured", "\n\n".join(map(measured_table, results)))
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


def write_switching(file: Path, result: Result) -> None:
    """Writes the table of a run of the suite switch."""
    markdown.replace(file, "switching", times_table(result))


def write_scale(file: Path, result: Result) -> None:
    """Writes the table of a run of the suite scale."""
    markdown.replace(file, "scale", scale_table(result))


def scale_table(result: Result) -> str:
    """A run's machine, and a row for each case: the contenders' times or bytes, and ia3rt's ratio to the reference."""
    head = readable.ran(f"{result.model}, {result.dtype}: `{result.command}`", result.machine, result.versions)
    rows = []
    for case in result.cases:
        measured = {each.contender: each for each in case.measurements}
        show = (lambda taken: readable.size(taken.p50)) if case.unit == "bytes" else _spread
        shown = (show(measured[name].taken) if name in measured else "" for name in result.contenders)
        ratio = readable.cell(measured["ia3rt"], case.control) if "ia3rt" in measured else ""
        to = f"{ratio} × {case.reference}" if ratio and ratio != readable.NOISY else ratio
        rows.append((case.name, *shown, to, readable.control(case.control)))
    header = ("case", *result.contenders, "ia3rt", "control")
    return "\n\n".join((head, str(markdown.table(header, rows))))


def write_launching(file: Path) -> None:
    """Times launches, and writes the table."""
    markdown.check(file, "launching")
    markdown.replace(file, "launching", launching_table(*host_times()))


def launching_table(unit: float, times: Sequence[HostTime]) -> str:
    """This machine, and a row for each operation."""
    head = readable.ran(f"{UNIT}(x, y) on 16 numbers: {unit:.2f} µs", machine(), versions())
    rows = []
    for time in times:
        numbers = time.microseconds, time.units, time.op_microseconds, time.op_units
        cells = ("" if number is None else f"{number:.2f}" for number in numbers)
        rows.append((time.operation, str(time.launches), *cells))
    header = ("one row, bfloat16", "launches", "µs", f"× {UNIT}", "public op, µs", f"× {UNIT}")
    return "\n\n".join((head, str(markdown.table(header, rows))))


def write_calling(file: Path) -> None:
    """Times calls of compiled models, and writes the table."""
    markdown.check(file, "calling")
    times = list(call_times())
    head = readable.ran(f"medians of {CALLS} calls, the least of {ROUNDS} rounds", machine(), versions())
    header = ("µs a call, compiled", *(f"{layers} layers" for layers in LAYERS), "a layer more")
    rows = []
    for each in times:
        taken = [each.microseconds[layers] for layers in LAYERS]
        more = (taken[-1] - taken[0]) / (LAYERS[-1] - LAYERS[0])
        rows.append((each.contender, *(f"{micro:.0f}" for micro in taken), f"{more:.1f}"))
    markdown.replace(file, "calling", "\n\n".join((head, str(markdown.table(header, rows)))))


def times_table(result: Result) -> str:
    """A run's machine, and a row for each case: the contenders' times, and their ratios to the first."""
    head = readable.ran(f"{result.model}, {result.dtype}: `{result.command}`", result.machine, result.versions)
    reference, *others = result.contenders
    rows = []
    for case in result.cases:
        measured = {each.contender: each for each in case.measurements}
        times = (_spread(measured[name].taken) if name in measured else "" for name in result.contenders)
        ratios = (readable.cell(measured[name], case.control) if name in measured else "" for name in others)
        rows.append((case.name, *times, *ratios, readable.control(case.control)))
    header = ("case", *result.contenders, *(f"{name} × {reference}" for name in others), "control")
    return "\n\n".join((head, str(markdown.table(header, rows))))


def _spread(taken: Timing) -> str:
    return f"{readable.seconds(taken.p50)} ({readable.seconds(taken.p20)} … {readable.seconds(taken.p80)})"


def measured_table(result: Result) -> str:
    """A run's machine, and a row for each case: the contenders' ratios to the reference, and the control's."""
    head = readable.ran(f"{result.model}, {result.dtype}: `{result.command}`", result.machine, result.versions)
    reference = next(name for name in UNADAPTED_FIRST if name in result.contenders)
    contenders = [name for name in result.contenders if name != reference]

    def row(case: CaseResult) -> tuple[str, ...]:
        cells = {measured.contender: readable.cell(measured, case.control) for measured in case.measurements}
        shown = (cells.get(name, "") for name in contenders)
        return (f"{case.suite}: {case.name}", *shown, readable.control(case.control))

    rows = [row(case) for case in result.cases if case.reference == reference]
    return "\n\n".join([head, markdown.table((f"× {reference}", *contenders, "control"), rows)])
