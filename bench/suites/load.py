"""Loading a checkpoint from the disk."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject

ADAPTERS = 4


def _cases(quick: bool) -> Iterator[Case]:
    ways = by_subject(lambda workshop, subject: subject.load(workshop.adapters.folder("task0")), ADAPTERS)
    yield Case("load", {"adapters": ADAPTERS}, ways, references=PEFT_FIRST)


SUITE = Suite("load", "load_adapter of a checkpoint that the system's cache holds.", _cases, x="adapters")
