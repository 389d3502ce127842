"""A training step."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.suites.case import PEFT_FIRST, Case, Suite, by_subject


def _cases(quick: bool) -> Iterator[Case]:
    for rows, length in [(1, 8)] if quick else [(4, 128), (16, 128)]:
        yield _case(rows, length)


def _case(rows: int, length: int) -> Case:
    # A purpose for each: its adapters have been trained, and others' must not have been.
    purpose = f"train {rows} {length}"
    ways = by_subject(lambda workshop, subject: subject.train(workshop.ids(rows, length), "task0"), 1, purpose)
    parameters = {"rows": rows, "length": length}
    return Case("step", parameters, ways, references=PEFT_FIRST, work=rows * length, unit="tokens")


SUITE = Suite("train", "A training step of one adapter: forward, backward and AdamW.", _cases, x="rows")
