"""Wearing another adapter, adding one, deleting one."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.contenders.subject import Subject, Way
from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject
from ia3rt.bench.workshop import Workshop

ADAPTERS = 4


def _cases(quick: bool) -> Iterator[Case]:
    mixes = [(f"task{position}",) for position in range(ADAPTERS)]

    def switch(workshop: Workshop, subject: Subject) -> Way:
        return subject.switch(mixes)

    def switch_and_forward(workshop: Workshop, subject: Subject) -> Way:
        return subject.switch(mixes, then=workshop.ids(1, 8))

    def add(workshop: Workshop, subject: Subject) -> Way:
        return subject.add(workshop.adapters.vectors("task0"))

    def delete(workshop: Workshop, subject: Subject) -> Way:
        return subject.delete(workshop.adapters.vectors("task0"))

    ways = {"set": switch, "set, then a forward": switch_and_forward, "add": add, "delete": delete}
    for what, way in ways.items():
        if quick and way is switch_and_forward:
            continue
        yield Case(what, {"adapters": ADAPTERS}, by_subject(way, ADAPTERS), references=PEFT_FIRST)


SUITE = Suite(
    "switch",
    "Making all rows wear another adapter (merged weights: unmerge and merge), adding one from tensors, deleting one.",
    _cases,
    x="adapters",
)
