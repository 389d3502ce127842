"""Which adapters are combined: all pairs, all triples, all at once, and a cycle of each for tuning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


def all_sets(tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """Pairs, triples and all of them, in this order; no set twice."""
    sizes = sorted({size for size in (2, 3, len(tasks)) if 2 <= size <= len(tasks)})
    return [each for size in sizes for each in combinations(tasks, size)]


def cycle(tasks: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Sets of neighbours on a circle of the tasks, in which each task stands equally often; all of them is one set."""
    if size >= len(tasks):
        return [tuple(tasks)]
    return [tuple(tasks[(start + step) % len(tasks)] for step in range(size)) for start in range(len(tasks))]
