"""Times the operations of a decoder layer in every way there is, side by side: `python -m ia3rt.bench layers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ia3rt.bench.interleaved import time_interleaved
from ia3rt.bench.layers.case import UNADAPTED, Case, Way
from ia3rt.bench.roofline import Card, seconds
from ia3rt.bench.shapes import Shape


@dataclass(frozen=True)
class LayerTime:
    """What one way took for one operation."""

    case: str
    rows: int
    way: str
    mode: str
    """`graph`: replayed in a CUDA graph, so the kernels alone; `eager`: with what launching them costs."""
    p20: float
    p50: float
    p80: float
    """Seconds a run."""
    ratio: float
    """p50 by that of the layer without IA³, timed in turn with it."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)


def time_layers(
    cases: Iterable[Case],
    shape: Shape,
    rows: Iterable[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int = 50,
    turns: int = 20,
) -> Iterator[LayerTime]:
    """Time each case for each number of rows; a measurement is `turns` runs, over weights that take turns."""
    rows = list(rows)
    for case in cases:
        for count in rows:
            with torch.no_grad():
                ways = case.ways(shape, count, device, dtype)
                yield from _timed(case, count, "eager", {name: loop(way, turns) for name, way in ways.items()}, rounds)
                if device.type == "cuda":
                    graphs = {name: captured(way, turns) for name, way in ways.items()}
                    yield from _timed(case, count, "graph", graphs, rounds)


def _timed(
    case: Case, rows: int, mode: str, ways: dict[str, tuple[Callable[[], object], int]], rounds: int
) -> Iterator[LayerTime]:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = time_interleaved({name: lambda _, run=run: run() for name, (run, _) in ways.items()}, rounds, wait=wait)
    for name, (_, turns) in ways.items():
        time, base = times[name], times[UNADAPTED]
        percentiles = (time.p20 / turns, time.p50 / turns, time.p80 / turns)
        yield LayerTime(case.name, rows, name, mode, *percentiles, time.p50 / base.p50)


def loop(way: Way, turns: int) -> tuple[Callable[[], object], int]:
    """Return what runs a way for `turns` turns, and that number."""

    def run() -> None:
        for turn in range(turns):
            way(turn)

    return run, turns


def captured(way: Way, turns: int) -> tuple[Callable[[], object], int]:
    """The same in a CUDA graph, after a run that compiles what has to be."""
    run, _ = loop(way, turns)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay, turns


def predicted(case: Case, shape: Shape, rows: int, card: Card) -> dict[str, float]:
    """Return by way the roofline's time as a ratio to the layer without IA³."""
    times = {way: seconds(work, card) for way, work in case.work(shape, rows).items()}
    return {way: time / times[UNADAPTED] for way, time in times.items()}
