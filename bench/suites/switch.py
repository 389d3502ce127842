"""Wearing another adapter, adding one, deleting one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

from ia3rt.bench.busy import busy_cores
from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject

ADAPTERS = 4
BUSY = "set, cores busy"
"""A server's cores have other work too: what waits for other threads waits for that."""
AFTER = "set, after a forward"
"""As requests switch: one straight after another finds all that it needs in the cores' caches."""
WITHOUT = {"merged": "merging takes seconds, whatever the cores do and did"}


def _cases(quick: bool) -> Iterator[Case]:
    mixes = [(f"task{position}",) for position in range(ADAPTERS)]
    ways = {
        "set": lambda _, subject: subject.switch(mixes),
        BUSY: lambda _, subject: subject.switch(mixes),
        AFTER: lambda workshop, subject: subject.switch(mixes, after=workshop.ids(1, 8)),
        "set, then a forward": lambda workshop, subject: subject.switch(mixes, then=workshop.ids(1, 8)),
        "add": lambda workshop, subject: subject.add(workshop.adapters.vectors("task0")),
        "delete": lambda workshop, subject: subject.delete(workshop.adapters.vectors("task0")),
    }
    for what, way in ways.items():
        if not (quick and what == "set, then a forward"):
            beside = busy_cores if what == BUSY else nullcontext
            made = by_subject(way, ADAPTERS, without=WITHOUT if what in (BUSY, AFTER) else None)
            yield Case(what, {"adapters": ADAPTERS}, made, references=PEFT_FIRST, beside=beside)


SUITE = Suite(
    "switch",
    "Making all rows wear another adapter (merged weights: unmerge and merge), adding one from tensors, deleting one; "
    "and making them wear another while a process for each core keeps the cores busy, and after a forward each.",
    _cases,
    x="adapters",
)
