"""The model with an adapter multiplied into its weights: as fast as the base model, and one adapter for all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import ia3rt
from ia3rt.bench.adapters import AdapterSet
from ia3rt.bench.contenders.subject import Subject
from ia3rt.bench.models import clone
from ia3rt.bench.workshop import Workshop


class Merged(Subject):  # type: ignore[misc]
    """A plain model, whose weights a patched twin merges adapters into.

    Args:
        model: whose weights at the sites are its own.
        runtime: of a twin with the same weights.
        adapters: where it takes from what it is to wear.
    """

    does_no_more = "it is merged with what all rows wear, and holds nothing else"

    def __init__(self, model: nn.Module, runtime: ia3rt.Runtime, adapters: AdapterSet) -> None:
        super().__init__(model)
        self._adapters = adapters
        self._runtime = runtime
        self._is_merged = False

    def wear(self, names: Sequence[str]) -> None:
        """Puts the weights back bit for bit, and merges the product of these adapters."""
        if self._is_merged:
            self._runtime.unmerge_adapter()
        for name in names:
            if name not in self._runtime.adapters:
                self._runtime.load_adapter(self._adapters.folder(name), name)
        self._runtime.merge_adapter(list(names))
        self._is_merged = True


def subject(workshop: Workshop, names: Sequence[str]) -> Merged:
    """A model of its own at the sites; all else is shared."""
    model = clone(workshop.model, own=workshop.adapters.paths)
    return Merged(model, ia3rt.patch(clone(model)), workshop.adapters)
