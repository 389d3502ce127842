"""ia3rt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

import ia3rt
from ia3rt.adapters.site import SiteKey
from ia3rt.bench.adapters import DISTINCT
from ia3rt.bench.contenders.answering import answer, read
from ia3rt.bench.contenders.questions import Questions
from ia3rt.bench.contenders.subject import LeftOut, Subject, Way
from ia3rt.bench.machine import free_memory
from ia3rt.bench.models import clone
from ia3rt.bench.workshop import Workshop


class Ia3rt(Subject):  # type: ignore[misc]
    """A patched model."""

    def __init__(self, model: nn.Module, runtime: ia3rt.Runtime) -> None:
        super().__init__(model)
        self._runtime = runtime

    def wear(self, names: Sequence[str]) -> None:
        """set_adapter, with a list for several."""
        self._runtime.set_adapter(names[0] if len(names) == 1 else list(names))

    def mixed(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """One forward; saying what the rows wear is measured too."""
        return Way.computing(lambda: self._logits(ids), first=lambda: self._runtime.route(worn))

    def document(self, questions: Questions) -> Way:
        """All rows in one batch: from the document's end on each wears its adapter, or from the first token."""
        rows, start = len(questions.asked), questions.document.shape[1]

        def answers(tokens: int) -> Tensor:
            cache = None
            if questions.once:
                with self._runtime.disable_adapter():
                    cache = read(self.model, questions.document)
                cache.batch_repeat_interleave(rows)
            with self._runtime.route(questions.worn, start=start if questions.once else None):
                logits: Tensor = answer(self.model, questions.prompts, tokens, cache)
            return logits

        return Way(lambda _: answers(questions.tokens), lambda: answers(1))

    def adder(self, vectors: dict[SiteKey, Tensor]) -> Callable[[str], object]:
        """add_adapter."""
        return lambda name: self._runtime.add_adapter(name, vectors)

    def loader(self, folder: Path) -> Callable[[str], object]:
        """load_adapter; the bank grows as it needs to."""
        return lambda name: self._runtime.load_adapter(folder, name)

    def remove(self, name: str) -> None:
        """delete_adapter."""
        self._runtime.delete_adapter(name)

    def trained(self, name: str) -> Sequence[nn.Parameter]:
        """train_adapter."""
        return self._runtime.train_adapter(name)

    def resident_bytes(self) -> int:
        """The bytes of the whole bank, with the rows that are still free."""
        return self._runtime.stats().device_bytes


def build(
    workshop: Workshop, names: Sequence[str], backend: Literal["triton"] | None = None
) -> tuple[nn.Module, ia3rt.Runtime]:
    """A patched model that shares all weights, with these adapters."""
    free, needed = free_memory(workshop.settings.device), 4 * workshop.adapters.numbers * len(names)
    if free is not None and needed > free // 2:
        raise LeftOut(f"{len(names):,} adapters take {needed / 1e9:,.1f} GB of the {free / 1e9:,.1f} GB that are free")
    model = clone(workshop.model)
    runtime = ia3rt.patch(model, capacity=len(names), backend=backend)
    vectors = [workshop.adapters.vectors(name) for name in names[:DISTINCT]]
    for position, name in enumerate(names):
        if position < DISTINCT:
            runtime.load_adapter(workshop.adapters.folder(name), name)
        else:
            runtime.add_adapter(name, vectors[position % DISTINCT])
    return model, runtime


def subject(workshop: Workshop, names: Sequence[str]) -> Ia3rt:
    """A patched model with these adapters."""
    return Ia3rt(*build(workshop, names))
