"""ia3rt under torch.compile."""

from __future__ import annotations

from collections.abc import Sequence

from ia3rt.bench.contenders.ia3rt import Ia3rt, build
from ia3rt.bench.contenders.subject import Compiled
from ia3rt.bench.workshop import Workshop


class Ia3rtCompiled(Compiled, Ia3rt):  # type: ignore[misc]
    """A compiled patched model."""


def subject(workshop: Workshop, names: Sequence[str]) -> Ia3rtCompiled:
    """A compiled patched model with these adapters."""
    made = Ia3rtCompiled(*build(workshop, names))
    made.compile(made.model)
    return made
