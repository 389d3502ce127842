"""The model without any adapter: what a forward costs at least."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ia3rt.bench.contenders.answering import answer, read
from ia3rt.bench.contenders.questions import Questions
from ia3rt.bench.contenders.subject import Subject, Way
from ia3rt.bench.models import clone
from ia3rt.bench.workshop import Workshop


class Base(Subject):  # type: ignore[misc]
    """An unpatched model. Rows that should wear adapters wear none."""

    adapted = False

    def wear(self, names: Sequence[str]) -> None:
        """Does nothing."""

    def mixed(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """One forward, in which no row wears anything."""
        return self.prefill(ids, ())

    def document(self, questions: Questions) -> Way:
        """The document is read once in any case: what an answer costs at least."""

        def run(_: int) -> Tensor:
            cache = read(self.model, questions.document)
            cache.batch_repeat_interleave(len(questions.asked))
            logits: Tensor = answer(self.model, questions.prompts, questions.tokens, cache)
            return logits

        return Way(run)


def subject(workshop: Workshop, names: Sequence[str]) -> Base:
    """The base model."""
    return Base(clone(workshop.model))
