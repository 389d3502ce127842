"""PEFT under torch.compile."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ia3rt.bench.contenders.peft import Peft, build
from ia3rt.bench.contenders.subject import Compiled, LeftOut, Way
from ia3rt.bench.workshop import Workshop


class PeftCompiled(Compiled, Peft):  # type: ignore[misc]
    """A compiled PeftModel. It compiles again for each set of adapters that it wears, once; here the warm-up did."""

    def mixed(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """Left out."""
        raise LeftOut("it would compile for each adapter and each number of its rows")


def subject(workshop: Workshop, names: Sequence[str]) -> PeftCompiled:
    """A compiled PeftModel with these adapters."""
    made = PeftCompiled(build(workshop, names))
    made.compile(made.model)
    return made
