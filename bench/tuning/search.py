"""Times the configs of a shape, and says which is the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from ia3rt.bench.captured import captured, loop
from ia3rt.bench.interleaved import time_interleaved
from ia3rt.bench.layers.case import Inputs
from ia3rt.bench.tuning.operation import Operation

GAIN = 0.97
"""What another config's time has to be below, as a share of the default's, to replace it: less is noise."""

Measure = Callable[[Operation, Any, list[Any]], list[float]]
"""Returns the seconds of each config of a shape, infinite where the card cannot run it."""


def tune(
    operation: Operation, shapes: Iterable[Any], measure: Measure, arch: str, processors: int
) -> Iterator[tuple[Any, Any, float]]:
    """Yield for each shape its best config, and that one's time as a share of the default's, which wins a tie."""
    for shape in shapes:
        configs = operation.candidates(shape, arch, processors)
        times = measure(operation, shape, configs)
        best = min(range(len(configs)), key=lambda index: times[index])
        share = times[best] / times[0]
        yield (shape, configs[best], share) if share < GAIN else (shape, configs[0], 1.0)


def measure_on(device: torch.device, rounds: int = 20, turns: int = 20) -> Measure:
    """Return what times configs on a device, in turn."""

    def measure(operation: Operation, shape: Any, configs: list[Any]) -> list[float]:
        run = operation.runner(shape, Inputs(device, getattr(torch, shape.dtype)))
        capture = captured if device.type == "cuda" else loop
        ways = {}
        for index, config in enumerate(configs):
            try:
                ways[str(index)] = capture(lambda turn, config=config: run(config, turn), turns)
            except OutOfResources:
                continue
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        timed = time_interleaved({name: lambda _, way=way: way() for name, way in ways.items()}, rounds, wait=wait)
        return [timed[str(index)].p50 if str(index) in timed else float("inf") for index in range(len(configs))]

    return measure
