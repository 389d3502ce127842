"""Where a decoding step's time above the base model's goes, by operator, as torch's profiler sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from ia3rt.bench.adapters import names
from ia3rt.bench.contenders.registry import CONTENDERS
from ia3rt.bench.contenders.subject import Way
from ia3rt.bench.profile.counted import PROMPT
from ia3rt.bench.settings import Settings
from ia3rt.bench.workshop import Workshop

CONTENDERS_SHOWN = ("base", "peft", "ia3rt")


def by_operator(dtype: torch.dtype, rounds: int = 60) -> dict[str, Counter[str]]:
    """Microseconds of a decoding step by contender and operator, without what the operators call.

    The contenders take turns, a step each, so that what slows the machine down slows all of them. The profiler makes
    each operator slower; how the operators share the time is what this shows.
    """
    settings = Settings([], [], model="smollm2-135m", dtype=dtype)
    with Workshop(settings, CONTENDERS) as workshop:
        ways = {name: workshop.subject(name, 1).decode(workshop.ids(1, PROMPT), names(1)) for name in CONTENDERS_SHOWN}
        for way in ways.values():
            way.run(0)
        sums: dict[str, Counter[str]] = {name: Counter() for name in ways}
        for turn in range(rounds):
            for name, way in ways.items():
                sums[name].update(_profiled(way, turn))
    return {
        name: Counter({operator: total / rounds for operator, total in taken.items()}) for name, taken in sums.items()
    }


def table_rows(taken: dict[str, Counter[str]], most: int = 8) -> list[Sequence[str]]:
    """The operators that differ most from the base model's, and all of them together."""
    base = taken["base"]
    others = [name for name in taken if name != "base"]
    operators = set().union(*taken.values())
    gap = {operator: max(abs(taken[name][operator] - base[operator]) for name in others) for operator in operators}
    shown = sorted(operators, key=lambda operator: -gap[operator])[:most]
    rows: list[Sequence[str]] = [
        (operator, f"{base[operator]:,.0f}", *(f"{taken[name][operator] - base[operator]:+,.0f}" for name in others))
        for operator in shown
    ]
    whole = {name: sum(counter.values()) for name, counter in taken.items()}
    total = (f"{whole['base']:,.0f}", *(f"{whole[name] - whole['base']:+,.0f}" for name in others))
    return [*rows, ("all operators", *total)]


def _profiled(way: Way, turn: int) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        way.run(turn)
    return Counter({event.key: event.self_cpu_time_total for event in profiled.key_averages()})
