"""How the number of adapters that are there, but not worn, shows."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.contenders.subject import Subject, Way
from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject
from ia3rt.bench.workshop import Workshop

ROWS, LENGTH = 2, 4
WITHOUT = {"merged": "how many other adapters there are is nothing to merged weights"}


def _cases(quick: bool) -> Iterator[Case]:
    for count in (10, 1000) if quick else (1, 10, 100, 1000, 10_000):
        yield _switch(count)
        yield _forward(count)


def _switch(count: int) -> Case:
    def way(workshop: Workshop, subject: Subject) -> Way:
        return subject.switch([(f"task{count - 1}",), ("task0",)])

    return Case("set", {"adapters": count}, by_subject(way, count, "scale", WITHOUT), references=PEFT_FIRST)


def _forward(count: int) -> Case:
    def way(workshop: Workshop, subject: Subject) -> Way:
        return subject.mixed(workshop.ids(ROWS, LENGTH), ["task0", f"task{count - 1}"])

    parameters = {"adapters": count, "rows": ROWS}
    ways = by_subject(way, count, "scale", WITHOUT)
    return Case("mixed forward", parameters, ways, work=ROWS * LENGTH, unit="tokens")


SUITE = Suite("scale", "Switching, and a mixed forward, beside many resident adapters.", _cases, x="adapters")
