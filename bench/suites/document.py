"""Adapters that answer about one document, which the base model reads for all of them, or each by itself."""

from __future__ import annotations

from collections.abc import Iterator

from ia3rt.bench.adapters import names
from ia3rt.bench.contenders.questions import Questions
from ia3rt.bench.contenders.subject import Subject, Way
from ia3rt.bench.suites.case import Case, Suite, by_subject
from ia3rt.bench.workshop import Workshop

ROUNDS = 3
"""At 64 adapters and 2,048 tokens a round takes minutes, and the ways differ many times over."""
_STEPS = "generate() grows its cache, so that each step has a shape of its own to compile"
WITHOUT = {
    "merged": "it is merged with what all rows wear, and holds nothing else",
    "adapterhub": "the process that it runs in is not asked for this",
    "base-compiled": _STEPS,
    "peft-compiled": _STEPS,
    "ia3rt-compiled": _STEPS,
}


def _cases(quick: bool) -> Iterator[Case]:
    for sizes in [(4, 32, 4, 2)] if quick else [(8, 512, 16, 8), (64, 2048, 16, 8)]:
        yield _case("read once", *sizes, once=True)
        yield _case("read by each", *sizes, once=False)


def _case(what: str, adapters: int, length: int, asked: int, new: int, once: bool) -> Case:
    def way(workshop: Workshop, subject: Subject) -> Way:
        document, questions = workshop.ids(1, length), workshop.ids(adapters, asked)
        return subject.document(Questions(document, questions, names(adapters), new, once))

    ways = by_subject(way, adapters, "document", WITHOUT)
    parameters: dict[str, int | str] = {"adapters": adapters, "length": length, "asked": asked, "new": new}
    rounds = None if adapters < 64 else ROUNDS
    return Case(what, parameters, ways, work=adapters * new, unit="tokens", rounds=rounds)


SUITE = Suite(
    "document",
    "Each adapter answers a question about one document, by generate(). Either the base model reads it once, and the "
    "adapters go on with its key-value cache, or each adapter reads it. ia3rt answers all questions in one batch, PEFT "
    "one after another. Ratios are to the base model's answers, which always reads it once.",
    _cases,
    x="length",
)
