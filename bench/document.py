"""Writes tables of docs/kernels.md: what the compilers made of the kernels, and what the roofline predicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ia3rt.bench import markdown, recorded
from ia3rt.bench.compiled.build import PLAIN
from ia3rt.bench.compiled.facts import Facts
from ia3rt.bench.layers.case import BY_ROW, FUSED, ROWS, SEPARATE
from ia3rt.bench.layers.registry import CASES
from ia3rt.bench.roofline import H100
from ia3rt.bench.shapes import LLAMA_3_8B


def compiled_facts(arch: str) -> dict[str, Facts]:
    """Build every shipped launch, in a process of its own: in this one Triton may have another driver already."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ia3rt.bench.compiled", arch]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    facts: dict[str, Facts] = json.loads(done.stdout)
    return facts


def compiled_table(facts: dict[str, Facts]) -> str:
    """Return a row for each kernel; with a scale / without any, where both were built."""

    def cell(name: str, fact: str) -> str:
        plain = facts.get(name + PLAIN)
        value = f"{facts[name].get(fact, 0):,}"
        return f"{value} / {plain[fact]:,}" if plain else value

    columns = ("registers", "spills", "shared", "instructions", "matrix", "loop")
    rows = [
        (name, *(cell(name, column) for column in columns))
        for name in facts
        if not name.endswith(PLAIN) and PLAIN + "," not in name
    ]
    header = ("launch", "registers", "spills", "shared bytes", "instructions", "of them tensor core", "main loop")
    text: str = markdown.table(header, rows)
    return text


def roofline_table() -> str:
    """Return ratios to the layer without IA³ on an H100, at Llama-3-8B's widths: predicted / measured in a graph."""
    measured, rows = recorded.layer_times(recorded.GRAPH, "ratio"), []
    for case in CASES.values():
        for count in ROWS:
            work = case.work(LLAMA_3_8B, count)
            ratios = case.predicted(LLAMA_3_8B, count, H100)
            megabytes, gigaflops = (sum(kernel[i] for kernel in work[FUSED]) for i in (0, 1))
            separate = sum(kernel.bytes for kernel in work[SEPARATE])
            cells = (f"{megabytes / 1e6:,.2f}", f"{separate / 1e6:,.2f}", f"{gigaflops / 1e9:,.3f}")
            beside = measured[case.name, count]
            shown = (f"{ratios[way]:.3f} / {beside[way]:.3f}" for way in (FUSED, BY_ROW, SEPARATE))
            rows.append((case.name, count, *cells, *shown))
    header = ("operation", "rows", "MB fused", "MB separate", "GFLOP", "fused", "a mix a row", "separate scale")
    text: str = markdown.table(header, rows)
    return text


def write_roofline(file: Path) -> None:
    """Write the roofline's table into `file`, with what was measured."""
    markdown.replace(file, "roofline", roofline_table())


def write(file: Path) -> None:
    """Write both tables into `file`."""
    markdown.check(file, "roofline", "sm_90")
    write_roofline(file)
    markdown.replace(file, "sm_90", compiled_table(compiled_facts("sm_90")))
