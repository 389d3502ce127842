"""A training step."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.contenders.subject import Subject, Way
from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject
from ia3rt.bench.workshop import Workshop


def _cases(quick: bool) -> Iterator[Case]:
    for rows, length in [(1, 8)] if quick else [(4, 128), (16, 128)]:
        yield _case(rows, length)


def _case(rows: int, length: int) -> Case:
    def way(workshop: Workshop, subject: Subject) -> Way:
        return subject.train(workshop.ids(rows, length), "task0")

    # A purpose for each: its adapters have been trained, and others' must not have been.
    ways = by_subject(way, 1, f"train {rows} {length}")
    parameters = {"rows": rows, "length": length}
    return Case("step", parameters, ways, references=PEFT_FIRST, work=rows * length, unit="tokens")


SUITE = Suite("train", "A training step of one adapter: forward, backward and AdamW.", _cases, x="rows")
