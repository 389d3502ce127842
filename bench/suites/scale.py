"""How the number of adapters that are there, but not worn, shows."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject

ROWS, LENGTH = 2, 4
WITHOUT = {"merged": "how many other adapters there are is nothing to merged weights"}


def _cases(quick: bool) -> Iterator[Case]:
    for count in (10, 1000) if quick else (1, 10, 100, 1000, 10_000):
        yield _switch(count)
        yield _forward(count)


def _switch(count: int) -> Case:
    mixes = [(f"task{count - 1}",), ("task0",)]
    ways = by_subject(lambda _, subject: subject.switch(mixes), count, "scale", WITHOUT)
    return Case("set", {"adapters": count}, ways, references=PEFT_FIRST)


def _forward(count: int) -> Case:
    worn = ["task0", f"task{count - 1}"]
    way = lambda workshop, subject: subject.mixed(workshop.ids(ROWS, LENGTH), worn)  # noqa: E731
    ways = by_subject(way, count, "scale", WITHOUT)
    return Case("mixed forward", {"adapters": count, "rows": ROWS}, ways, work=ROWS * LENGTH, unit="tokens")


SUITE = Suite("scale", "Switching, and a mixed forward, beside many resident adapters.", _cases, x="adapters")
