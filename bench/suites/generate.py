"""Greedy generation, all rows wearing one adapter."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.suites.case import Case, Suite, by_subject


def _cases(quick: bool) -> Iterator[Case]:
    for rows, length, tokens in [(1, 8, 2)] if quick else [(1, 128, 32), (8, 128, 32)]:
        yield _case(rows, length, tokens)


def _case(rows: int, length: int, tokens: int, static: bool = False) -> Case:
    ways = by_subject(lambda workshop, subject: subject.generate(workshop.ids(rows, length), ["task0"], tokens, static))
    parameters: dict[str, int | str] = {"rows": rows, "length": length, "new": tokens}
    if static:
        parameters["cache"] = "static"
    return Case("generate", parameters, ways, work=rows * tokens, unit="tokens")


def _with_static_cache(case: Case) -> Case:
    """A loop on the host cannot be captured: with a static cache transformers compiles the steps, with CUDA graphs."""
    rows, length, tokens = (int(case.parameters[name]) for name in ("rows", "length", "new"))
    return _case(rows, length, tokens, static=True)


SUITE = Suite(
    "generate",
    "model.generate(), greedy: tokens a second, with the prompt's forward.",
    _cases,
    x="rows",
    in_graph=_with_static_cache,
)
