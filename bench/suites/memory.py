"""What adapters take in memory."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.adapters import names
from ia3rt.bench.contenders.subject import LeftOut, Subject
from ia3rt.bench.machine import PeakMemory
from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, Value, by_subject
from ia3rt.bench.workshop import Workshop


def _cases(quick: bool) -> Iterator[Case]:
    for count in (10,) if quick else (10, 100):
        yield _peak(count)  # first: it loads what the other counts
        yield _resident(count)


def _peak(count: int) -> Case:
    def value(workshop: Workshop, subject: Subject) -> Value:
        folders = {f"more{name}": workshop.adapters.folder(name) for name in names(count)}
        peak = PeakMemory(workshop.settings.device)
        subject.load_many(folders)
        grown = peak.grown()
        if grown is None:
            raise LeftOut("this system does not say how much memory a process took at most")
        return Value(grown)

    ways = by_subject(value, 1, f"memory {count}")
    # No ratio: it is one sample, and the system counts in pages.
    return Case("peak while loading", {"adapters": count}, ways, references=(), unit="bytes")


def _resident(count: int) -> Case:
    def value(workshop: Workshop, subject: Subject) -> Value:
        return Value(subject.resident_bytes() / (count + 1))

    ways = by_subject(value, 1, f"memory {count}")
    return Case("resident, an adapter", {"adapters": count}, ways, references=PEFT_FIRST, unit="bytes")


SUITE = Suite(
    "memory",
    "The bytes of a resident adapter (ia3rt: with the rows of its table that are still free), and how much memory the "
    "process (on a GPU, its allocator) grew at most while it loaded checkpoints.",
    _cases,
    x="adapters",
)
