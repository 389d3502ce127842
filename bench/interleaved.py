"""Timing several ways of doing one thing side by side, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class Seconds(float):
    """What a way returns that took its time itself: one that works in another process, beside the message to it."""


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


def sample_interleaved(
    ways: Mapping[str, Callable[[int], object]],
    turns: Iterable[int],
    *,
    before: Callable[[str], None] = lambda _: None,
    after: Callable[[str], None] = lambda _: None,
    round_done: Callable[[], None] = lambda: None,
    wait: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Runs the ways in turn, round after round, and returns the seconds that each took, by round.

    Each round draws its order anew, from a seed: what comes after what is the same for none of them.

    Args:
        ways: what is compared, by name; each is called with the round's number.
        turns: the rounds' numbers.
        before: called with the way's name before each measurement, and is not measured.
        after: the same, after it.
        round_done: called after each round.
        wait: returns when the device has done what it was given, such as torch.cuda.synchronize.
        clock: the time in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    draw, order = random.Random(0), list(ways)
    for turn in turns:
        draw.shuffle(order)
        for name in order:
            before(name)
            wait()
            start = clock()
            result = ways[name](turn)
            wait()
            elapsed = clock() - start
            after(name)
            seconds[name].append(float(result) if isinstance(result, Seconds) else elapsed)
        round_done()
    return seconds


def time_interleaved(ways: Mapping[str, Callable[[int], object]], rounds: int, **options: Any) -> dict[str, Timing]:
    """Runs the ways in turn, round after round; a first round warms up and is not counted.

    Args:
        ways: what is compared, by name; each is called with the round's number, from 0 (the warm-up's is -1).
        rounds: how often each is timed, at least 1.
        options: of `sample_interleaved`.
    """
    seconds = sample_interleaved(ways, range(-1, rounds), **options)
    return {name: Timing.of(times[1:]) for name, times in seconds.items()}
