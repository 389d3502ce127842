"""Which mix each row or token of a batch wears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ia3rt.adapters.bank import ResolvedMix

Backend: TypeAlias = Literal["torch", "triton"]


@dataclass(frozen=True, eq=False)
class Route:
    """What a batch wears.

    Attributes:
        mixes: the distinct mixes in use.
        index: int64 on the CPU, [rows] or [rows, tokens]: the mix of each row or token; None where all rows of any
            batch wear `mixes[0]`.
    """

    mixes: tuple[ResolvedMix, ...]
    index: Tensor | None = None

    @classmethod
    def by_row(cls, mixes: Sequence[ResolvedMix]) -> Route:
        """One mix a row; rows that wear the same one share it."""
        slots: dict[tuple[object, ...], int] = {}
        distinct: list[ResolvedMix] = []
        index = []
        for mix in mixes:
            slot = slots.setdefault((mix.rows, mix.weights), len(distinct))
            if slot == len(distinct):
                distinct.append(mix)
            index.append(slot)
        return cls(tuple(distinct), torch.tensor(index))

    @property
    def by_token(self) -> bool:
        """Whether each token has a mix of its own."""
        return self.index is not None and self.index.dim() == 2
