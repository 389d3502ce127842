"""One forward, all rows wearing one adapter: prompts, and the step after them."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.suites.case import Case, Suite, by_subject
from ia3rt.bench.suites.graphs import in_graph


def _cases(quick: bool) -> Iterator[Case]:
    for rows, length in [(1, 16)] if quick else [(1, 128), (1, 512), (8, 128), (1, 2048)]:
        yield _case("prefill", rows, length, rows * length)
    for rows, length in [(1, 16)] if quick else [(1, 128), (4, 128), (16, 128), (64, 128), (1, 2048)]:
        yield _case("decode", rows, length, rows)


def _case(what: str, rows: int, length: int, tokens: int) -> Case:
    ways = by_subject(lambda workshop, subject: getattr(subject, what)(workshop.ids(rows, length), ["task0"]))
    return Case(what, {"rows": rows, "length": length}, ways, work=tokens, unit="tokens")


SUITE = Suite(
    "forward",
    "A forward over prompts (prefill), and the step after them (decode).",
    _cases,
    x="rows",
    in_graph=in_graph,
)
