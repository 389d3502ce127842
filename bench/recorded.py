"""What was measured on a GPU on some day, as bench/results keeps it, and the documents' tables of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ia3rt.bench import markdown
from ia3rt.bench.layers.case import FUSED, PEFT, ROWS, UNADAPTED
from ia3rt.bench.layers.registry import CASES

H100 = Path(__file__).with_name("results") / "h100"

GRAPH, EAGER = "graph", "eager"
WORN = {"one": "one adapter", "three": "a product of three", "rows": "one of 16 adapters a row"}
WAYS = {
    "peft": "PEFT",
    "ia3rt-torch": "ia3rt, torch backend",
    "ia3rt": "ia3rt",
    "ia3rt-gateup": "with fuse_gate_up",
    "ia3rt-attn": "with attention ia3rt",
    "control": "control",
}
"""What models were timed, as tables call them."""


def layer_times(mode: str, number: str, folder: Path = H100) -> dict[tuple[str, int], dict[str, float]]:
    """The times of a layer's operations, by operation and rows, and then by way.

    Args:
        mode: GRAPH or EAGER.
        number: "ratio", to the layer without IA³, or a percentile in seconds.
        folder: of the results.
    """
    times: dict[tuple[str, int], dict[str, float]] = {}
    for time in _read(folder / "layers.json"):
        if time["mode"] == mode:
            times.setdefault((time["case"], time["rows"]), {})[time["way"]] = time[number]
    return times


def launched_table(folder: Path = H100) -> str:
    """Microseconds of each operation: in a CUDA graph / with what launching costs the host."""
    graph, eager = (layer_times(mode, "p50", folder) for mode in (GRAPH, EAGER))

    def cell(key: tuple[str, int], way: str) -> str:
        return "" if way not in graph[key] else f"{_micro(graph[key][way])} / {_micro(eager[key][way])}"

    keys = [(name, rows) for name in CASES for rows in ROWS]
    header = ("µs, in a graph / eager", "rows", "without IA³", "fused", "PEFT")
    return _table(header, [(*key, *(cell(key, way) for way in (UNADAPTED, FUSED, PEFT))) for key in keys])


def quantised_table(folder: Path = H100) -> str:
    """Microseconds of quantised layers: a bf16 matmul, the kernel as it was that day, and with the best block sizes."""
    rows = []
    for sweep in _read(folder / "quantised-sweep.json"):
        taken = dict(sweep["us"])
        bf16, default = taken.pop("bf16"), taken.pop("default")
        best = min(default, *taken.values())
        shares = (f"{default / bf16:.2f}", f"{best / bf16:.2f}")
        head = (sweep["kind"], f"{sweep['K']:,} → {sweep['N']:,}", sweep["rows"])
        rows.append((*head, f"{bf16:.1f}", f"{default:.1f}", f"{best:.1f}", *shares))
    header = ("weight", "layer", "rows", "bf16, µs", "default, µs", "best, µs", "default × bf16", "best × bf16")
    return _table(header, rows)


def model_table(file: str, folder: Path = H100) -> str:
    """A row for each forward of a whole model: ratios to the base model, in a CUDA graph / without one."""
    ratios: dict[str, dict[str, Mapping[str, float]]] = {}
    for made in _read(folder / file):
        worn = WORN[made["worn"]]
        name = f"{made['what']}, {made['rows']} × {made['length']}, {worn}"
        ratios.setdefault(name, {})[made["mode"]] = made["ratio"]
    ways = [way for way in WAYS if any(way in modes[GRAPH] for modes in ratios.values())]

    def cell(modes: Mapping[str, Mapping[str, float]], way: str) -> str:
        return "" if way not in modes[GRAPH] else f"{modes[GRAPH][way]:.3f} / {modes[EAGER][way]:.3f}"

    rows = [(name, *(cell(modes, way) for way in ways)) for name, modes in ratios.items()]
    return _table(("× base, in a graph / eager", *(WAYS[way] for way in ways)), rows)


def write_kernels(file: Path) -> None:
    """Writes the tables of docs/kernels.md but for the roofline's, which has its predictions beside it."""
    markdown.replace(file, "h100 launched", launched_table())
    markdown.replace(file, "h100 quantised", quantised_table())


def write_performance(file: Path) -> None:
    """Writes the tables of docs/performance.md."""
    markdown.replace(file, "h100 model", model_table("model.json"))
    markdown.replace(file, "h100 compiled", model_table("model-compiled.json"))


def _read(file: Path) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))
    return read


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text: str = markdown.table(header, rows)
    return text


def _micro(seconds: float) -> str:
    micro = 1e6 * seconds
    return f"{micro:,.0f}" if micro >= 100 else f"{micro:.1f}"
