"""The command `ia3rt bench launch`."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ia3rt.cli.errors import MissingPackageError, errors_in_a_line


def launch(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the times to this JSON file.")] = None,
) -> None:
    """Time what a launch costs the host, from a drop-in's forward to the driver's call. No GPU is needed.

    Kernels are compiled for an H100, and Triton's driver is replaced by one that launches nothing.
    """
    with errors_in_a_line():
        if importlib.util.find_spec("triton") is None or sys.platform != "linux":
            raise MissingPackageError("this needs Triton, on Linux: pip install triton")
        if importlib.util.find_spec("transformers") is None:
            raise MissingPackageError("this needs transformers: pip install 'ia3rt[bench]'")
        from ia3rt.bench.launches.measured import CALLS, ROUNDS, UNIT, host_times
        from ia3rt.bench.machine import machine, versions

        console = Console()
        with console.status("Compiling kernels for an H100, and timing their launches"):
            unit, times = host_times()
        table = Table(title="What a launch costs the host", title_justify="left", box=None, header_style="bold")
        table.add_column("one row, bfloat16", no_wrap=True)
        for title in ("launches", "µs", f"× {UNIT}", "op, µs", f"× {UNIT}"):
            table.add_column(title, justify="right")
        for time in times:
            numbers = time.microseconds, time.units, time.op_microseconds, time.op_units
            cells = ("" if number is None else f"{number:.2f}" for number in numbers)
            table.add_row(time.operation, str(time.launches), *cells)
        console.print(table)
        note = (
            f"From a drop-in's forward, and the public op, to the last launch. Medians of {ROUNDS} rounds of {CALLS} "
            f"calls each, in turn; {UNIT}(x, y) on 16 numbers takes {unit:.2f} µs."
        )
        console.print(Text(note, style="dim"))
        if out is not None:
            found = {"machine": machine(), "versions": versions(), "unit_microseconds": unit}
            out.write_text(json.dumps({**found, "times": [*map(asdict, times)]}, indent=1) + "\n", "utf-8")
