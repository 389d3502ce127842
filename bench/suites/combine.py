"""Wearing the product of several adapters."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.adapters import DISTINCT, names
from ia3rt.bench.contenders.subject import Subject, Way
from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject
from ia3rt.bench.workshop import Workshop

LENGTH = 8


def _cases(quick: bool) -> Iterator[Case]:
    for count in (8,) if quick else (1, 2, 4, 8, 16):
        yield _forward(count)
        yield _set(count)


def _forward(count: int) -> Case:
    def way(workshop: Workshop, subject: Subject) -> Way:
        return subject.prefill(workshop.ids(1, LENGTH), names(count))

    parameters = {"mixed": count, "length": LENGTH}
    return Case("forward", parameters, by_subject(way, DISTINCT), work=LENGTH, unit="tokens")


def _set(count: int) -> Case:
    mixes = [names(count), names(count)[::-1]] if count > 1 else [("task0",), ("task1",)]

    def way(workshop: Workshop, subject: Subject) -> Way:
        return subject.switch(mixes)

    return Case("set", {"mixed": count}, by_subject(way, DISTINCT), references=PEFT_FIRST)


SUITE = Suite(
    "combine", "The product of several adapters, worn by all rows: a forward, and making them worn.", _cases, x="mixed"
)
