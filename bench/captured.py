"""How a way is run for many turns: one after another, or all of them in a CUDA graph, where launching costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch


def loop(way: Callable[[int], object], turns: int) -> Callable[[], object]:
    """Return what runs a way for so many turns."""

    def run() -> None:
        for turn in range(turns):
            way(turn)

    return run


def captured(way: Callable[[int], object], turns: int) -> Callable[[], object]:
    """The same in a CUDA graph, after a run that compiles what has to be."""
    run = loop(way, turns)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return partial(_replay, graph, run)


def _replay(graph: torch.cuda.CUDAGraph, run: Callable[[], object]) -> None:
    """Replays a graph, which reads the tensors that `run` holds."""
    graph.replay()
