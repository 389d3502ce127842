"""The model without any adapter: what a forward costs at least."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

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


def subject(workshop: Workshop, names: Sequence[str]) -> Base:
    """The base model."""
    return Base(clone(workshop.model))
