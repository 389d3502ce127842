"""Loading a checkpoint from the disk."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.contenders.subject import Subject, Way
from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject
from ia3rt.bench.workshop import Workshop

ADAPTERS = 4


def _cases(quick: bool) -> Iterator[Case]:
    def way(workshop: Workshop, subject: Subject) -> Way:
        return subject.load(workshop.adapters.folder("task0"))

    yield Case("load", {"adapters": ADAPTERS}, by_subject(way, ADAPTERS), references=PEFT_FIRST)


SUITE = Suite("load", "load_adapter of a checkpoint that the system's cache holds.", _cases, x="adapters")
