"""Timing several ways of doing one thing side by side, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds that one way took, over all rounds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The percentiles of some measurements."""
        if len(seconds) == 1:
            return cls(*seconds * 3)
        p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(p20, statistics.median(seconds), p80)


def time_interleaved(
    ways: Mapping[str, Callable[[int], object]],
    rounds: int,
    *,
    round_done: Callable[[], None] = lambda: None,
    wait: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Runs the ways in turn, round after round; a first round warms up and is not counted.

    Args:
        ways: what is compared, by name; each is called with the round's number, from 0 (the warm-up's is -1).
        rounds: how often each is timed, at least 1.
        round_done: called after each round.
        wait: returns when the device has done what it was given, such as torch.cuda.synchronize.
        clock: the time in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, rounds):
        for name, way in ways.items():
            wait()
            start = clock()
            way(turn)
            wait()
            elapsed = clock() - start
            if turn >= 0:
                seconds[name].append(elapsed)
        round_done()
    return {name: Timing.of(times) for name, times in seconds.items()}
