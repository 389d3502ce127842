"""Greedy generation, all rows wearing one adapter."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.suites.case import Case, Suite, by_subject


def _cases(quick: bool) -> Iterator[Case]:
    for rows, length, tokens in [(1, 8, 2)] if quick else [(1, 128, 32), (8, 128, 32)]:
        yield _case(rows, length, tokens)


def _case(rows: int, length: int, tokens: int) -> Case:
    ways = by_subject(lambda workshop, subject: subject.generate(workshop.ids(rows, length), ["task0"], tokens))
    return Case("generate", {"rows": rows, "length": length, "new": tokens}, ways, work=rows * tokens, unit="tokens")


SUITE = Suite("generate", "model.generate(), greedy: tokens a second, with the prompt's forward.", _cases, x="rows")
