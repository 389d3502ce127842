"""Wearing the product of several adapters."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.adapters import DISTINCT, names
from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject

LENGTH = 8


def _cases(quick: bool) -> Iterator[Case]:
    for count in (8,) if quick else (1, 2, 4, 8, 16):
        yield _forward(count)
        yield _set(count)


def _forward(count: int) -> Case:
    ways = by_subject(lambda workshop, subject: subject.prefill(workshop.ids(1, LENGTH), names(count)), DISTINCT)
    return Case("forward", {"mixed": count, "length": LENGTH}, ways, work=LENGTH, unit="tokens")


def _set(count: int) -> Case:
    mixes = [names(count), names(count)[::-1]] if count > 1 else [("task0",), ("task1",)]
    ways = by_subject(lambda _, subject: subject.switch(mixes), DISTINCT)
    return Case("set", {"mixed": count}, ways, references=PEFT_FIRST)


SUITE = Suite(
    "combine", "The product of several adapters, worn by all rows: a forward, and making them worn.", _cases, x="mixed"
)
