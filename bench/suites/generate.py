"""Greedy generation, all rows wearing one adapter."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.contenders.subject import Subject, Way
from ia3rt.bench.suites.case import Case, Suite, by_subject
from ia3rt.bench.workshop import Workshop


def _cases(quick: bool) -> Iterator[Case]:
    for rows, length, tokens in [(1, 8, 2)] if quick else [(1, 128, 32), (8, 128, 32)]:
        yield _case(rows, length, tokens)


def _case(rows: int, length: int, tokens: int) -> Case:
    def way(workshop: Workshop, subject: Subject) -> Way:
        return subject.generate(workshop.ids(rows, length), ["task0"], tokens)

    parameters = {"rows": rows, "length": length, "new": tokens}
    return Case("generate", parameters, by_subject(way), work=rows * tokens, unit="tokens")


SUITE = Suite("generate", "model.generate(), greedy: tokens a second, with the prompt's forward.", _cases, x="rows")
