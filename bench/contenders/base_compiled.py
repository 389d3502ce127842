"""The model without any adapter under torch.compile: what a compiled forward costs at least."""

from __future__ import annotations

from collections.abc import Sequence

from ia3rt.bench.contenders.base import Base
from ia3rt.bench.contenders.subject import Compiled
from ia3rt.bench.models import clone
from ia3rt.bench.workshop import Workshop


class BaseCompiled(Compiled, Base):  # type: ignore[misc]
    """A compiled unpatched model."""


def subject(workshop: Workshop, names: Sequence[str]) -> BaseCompiled:
    """The compiled base model."""
    made = BaseCompiled(clone(workshop.model))
    made.compile(made.model)
    return made
