"""What adapters take in memory."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.adapters import names
from ia3rt.bench.contenders.subject import Subject
from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, Value, by_subject
from ia3rt.bench.workshop import Workshop


def _cases(quick: bool) -> Iterator[Case]:
    for count in (10,) if quick else (10, 100):
        yield _case(count)


def _case(count: int) -> Case:
    def value(workshop: Workshop, subject: Subject) -> Value:
        for name in names(count):
            subject.loader(workshop.adapters.folder(name))(f"more{name}")
        return Value(subject.resident_bytes() / (count + 1))

    ways = by_subject(value, 1, f"memory {count}")
    return Case("resident, an adapter", {"adapters": count}, ways, references=PEFT_FIRST, unit="bytes")


SUITE = Suite(
    "memory",
    "The bytes of a resident adapter; ia3rt's with the rows of its table that are still free.",
    _cases,
    x="adapters",
)
