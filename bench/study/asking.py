"""Asks a model with combinations of adapters, or only counts what that would take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from ia3rt.bench.study.cells import Cell, Phase
from ia3rt.bench.study.methods import BySite, Combining, Method, Values
from ia3rt.bench.study.models import Prompt, StudyModel, score
from ia3rt.bench.study.splits import Split
from ia3rt.bench.study.store import Store, key_of
from ia3rt.bench.study.tasks import TASKS

Prompts = Mapping[tuple[str, Split], Sequence[Prompt]]
"""By task and split; each beginning of whole rounds through the labels is balanced."""

MERGED = "merged"


@dataclass(frozen=True)
class Question:
    """What is asked: the first `count` texts of a split, with an adapter's vectors and `owner`'s head.

    The other fields are those of the `Cell` that it becomes.
    """

    phase: Phase
    adapters: tuple[str, ...]
    method: str
    values: Values
    seed: int
    vectors: str | None
    owner: str
    task: str
    split: Split
    count: int

    def prompts(self, of_all: Prompts) -> Sequence[Prompt]:
        """The texts, as many of each label."""
        return balanced_part(of_all[self.task, self.split], self.task, self.count)

    def answered(self, model: str, predicted: Sequence[int], right: Sequence[int]) -> Cell:
        """What became of it."""
        digits, rights = ("".join(map(str, each)) for each in (predicted, right))
        who = (model, self.phase, self.adapters, self.method, dict(self.values), self.seed)
        return Cell(*who, self.task, self.split, digits, rights)


class Asking(Protocol):
    """Who answers: a model, or who counts."""

    def combined(self, method: Method, names: Sequence[str], values: Values) -> AbstractContextManager[str]:
        """A context in which a combination of adapters is there, and its name."""

    def cell(self, asked: Question) -> Cell:
        """What is answered."""


class ModelAsking:
    """Asks a model, whose adapters have been brought; what was asked before is known.

    Args:
        model: in the dtype that it answers in.
        prompts: what is asked.
        store: keeps what was answered.
        fisher: importances by adapter, as `Combining`.
        squares: E[h²] by adapter, as `Combining`.
        done: is told the tokens of what was answered.
    """

    def __init__(
        self,
        model: StudyModel,
        prompts: Prompts,
        store: Store,
        fisher: Mapping[str, BySite],
        squares: Mapping[str, BySite],
        done: Callable[[int], None],
    ) -> None:
        self._model, self._prompts, self._store = model, prompts, store
        self._fisher, self._squares, self._done = fisher, squares, done

    @contextmanager
    def combined(self, method: Method, names: Sequence[str], values: Values) -> Iterator[str]:
        """Makes the combination, and deletes it at the end."""
        method.combine(Combining(self._model.rt, names, self._fisher, self._squares), MERGED, values)
        try:
            yield MERGED
        finally:
            self._model.rt.set_adapter(None)
            self._model.rt.delete_adapter(MERGED)

    def cell(self, asked: Question) -> Cell:
        """Asks, or says what was answered by the same numbers to the same texts before."""
        prompts, task = asked.prompts(self._prompts), asked.task
        mix = self._model.worn(asked.vectors, asked.owner, task)
        numbers = [self._model.rt.get_adapter(each) for each in mix.adapters]
        worn = [(dict(each.vectors), dict(each.modules)) for each in numbers]
        tensors = [x for vectors_, modules in worn for x in (*vectors_.values(), *_flat(modules))]
        key = key_of(self._model.name, self._model.dtype, task, len(tensors), dict(enumerate(tensors)), prompts)

        def ask() -> dict[str, torch.Tensor]:
            self._model.rt.set_adapter(mix)
            return {"scores": score(self._model, prompts, task, lambda tokens: None)}

        scores = self._store.once(key, ask)["scores"]
        self._done(sum(len(each.ids) for each in prompts))
        predicted = scores.argmax(1).tolist()
        right = [int(one == each.label) for one, each in zip(predicted, prompts, strict=True)]
        return asked.answered(self._model.name, predicted, right)


class Counting:
    """Answers nothing right, and counts the tokens that a model would read.

    Attributes:
        tokens: so far.
        rows: so far.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self.tokens = self.rows = 0

    @contextmanager
    def combined(self, method: Method, names: Sequence[str], values: Values) -> Iterator[str]:
        """Makes nothing."""
        yield MERGED

    def cell(self, asked: Question) -> Cell:
        """Counts."""
        prompts = asked.prompts(self._prompts)
        self.tokens += sum(len(each.ids) for each in prompts)
        self.rows += len(prompts)
        zeros = [0] * len(prompts)
        return asked.answered("", zeros, zeros)


def balanced_part(prompts: Sequence[Prompt], task: str, count: int) -> Sequence[Prompt]:
    """The first `count` prompts or less, as many of each label."""
    return prompts[: count - count % len(TASKS[task].labels)]


def _flat(modules: Mapping[str, Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
    return [x for state in modules.values() for x in state.values()]
