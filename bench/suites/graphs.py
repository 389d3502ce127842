"""Cases once more in CUDA graphs, as `--graph` asks for: what the GPU takes, without what launching costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ia3rt.bench.captured import captured
from ia3rt.bench.contenders.subject import LeftOut, Way
from ia3rt.bench.likeness import distance, tolerance_of
from ia3rt.bench.suites.case import Case, Value, Ways, described
from ia3rt.bench.workshop import Workshop


def in_graph(case: Case) -> Case:
    """The case with each contender captured: ratios are to the captured reference, also the control's."""

    def ways(workshop: Workshop, contenders: Sequence[str]) -> Ways:
        tolerance = tolerance_of(workshop.settings.dtype)
        eager = case.ways(workshop, contenders)
        again = eager.again
        made = Ways(
            left_out=eager.left_out,
            failed=eager.failed,
            again=None if again is None else lambda name: captured_way(again(name), tolerance),
        )
        for name, way in eager.ways.items():
            try:
                made.ways[name] = captured_way(way, tolerance)
            except LeftOut as reason:
                made.left_out[name] = str(reason)
            except Exception as error:  # as in by_subject
                made.failed[name] = described(error)
        return made

    return dataclasses.replace(case, parameters={**case.parameters, "mode": "graph"}, ways=ways)


def captured_way(way: Way | Value, tolerance: float) -> Way:
    """What a way computes in a CUDA graph; what it does before, such as saying what rows wear, stays before a replay.

    Raises:
        LeftOut: nothing of it can be captured.
        ValueError: the graph computes another result than what was captured.
    """
    if isinstance(way, Value) or way.compute is None:
        raise LeftOut("what it does is not given to the GPU by this process, so that nothing can be captured here")
    first, compute = way.first, way.compute
    first()
    truth = compute().clone()
    kept: list[Tensor] = []

    def compute_and_keep(_: int) -> None:
        kept[:] = [compute()]

    replay = captured(compute_and_keep, 1)
    (computed,) = kept  # where each replay writes

    def run(_: int) -> Tensor:
        first()
        replay()
        return computed

    apart = distance(run(0), truth)
    if not apart <= tolerance:
        raise ValueError(f"another result in a CUDA graph than without: it is {apart:.2g} of its norm away")
    return Way(run, None if way.result is None else lambda: run(0), note=way.note)
