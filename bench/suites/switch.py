"""Wearing another adapter, adding one, deleting one."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject

ADAPTERS = 4


def _cases(quick: bool) -> Iterator[Case]:
    mixes = [(f"task{position}",) for position in range(ADAPTERS)]
    ways = {
        "set": lambda _, subject: subject.switch(mixes),
        "set, then a forward": lambda workshop, subject: subject.switch(mixes, then=workshop.ids(1, 8)),
        "add": lambda workshop, subject: subject.add(workshop.adapters.vectors("task0")),
        "delete": lambda workshop, subject: subject.delete(workshop.adapters.vectors("task0")),
    }
    for what, way in ways.items():
        if not (quick and what == "set, then a forward"):
            yield Case(what, {"adapters": ADAPTERS}, by_subject(way, ADAPTERS), references=PEFT_FIRST)


SUITE = Suite(
    "switch",
    "Making all rows wear another adapter (merged weights: unmerge and merge), adding one from tensors, deleting one.",
    _cases,
    x="adapters",
)
