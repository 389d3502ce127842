"""Which mix each row or token of a batch wears."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ia3rt.adapters.resolved import ResolvedMix
from ia3rt.routing.listed import listed

Backend: TypeAlias = Literal["torch", "triton"]


@dataclass(frozen=True, eq=False)
class Route:
    """What a batch wears.

    Attributes:
        mixes: the distinct mixes in use.
        index: int64 on the CPU, [rows] or [rows, tokens]: the mix of each row or token; None where all rows of any
            batch wear `mixes[0]`.
        start: int64 [rows] on the CPU, with an index [rows]: the position of the first token of each row that wears its
            mix; those before it wear the base model, which is one of `mixes` then. None where all wear it.
    """

    mixes: tuple[ResolvedMix, ...]
    index: Tensor | None = None
    start: Tensor | None = None

    @classmethod
    def by_row(cls, mixes: Sequence[ResolvedMix], where: Tensor | None = None) -> Route:
        """One mix a row; rows that wear the same one share it.

        Args:
            mixes: each row's; with `where`, the mixes that it points to.
            where: as `check_index` takes it.
        """
        slots: dict[object, int] = {}  # by the mix, as most that are equal are one, and by what it is
        distinct: list[ResolvedMix] = []
        index = []
        for mix in mixes:
            slot = slots.get(id(mix))
            if slot is None:
                slot = slots[id(mix)] = slots.setdefault(mix.terms, len(distinct))
                if slot == len(distinct):
                    distinct.append(mix)
            index.append(slot)
        slots_of_rows = torch.frombuffer(array("q", index), dtype=torch.int64)  # a quarter of what torch.tensor takes
        if where is not None:
            slots_of_rows = slots_of_rows[where.cpu().long()]
        return cls(tuple(distinct), slots_of_rows)

    def starting(self, start: Sequence[int], base: ResolvedMix) -> Route:
        """The same rows from a token on, where `index` is [rows]; the same route where that is the first of each.

        Args:
            start: of each row, the position of the first token that wears its mix.
            base: what those before it wear.
        """
        if not any(start):
            return self
        mixes = self.mixes if any(not mix.rows for mix in self.mixes) else (*self.mixes, base)
        return Route(mixes, self.index, torch.tensor(start, device="cpu"))

    def of(self, rows: Sequence[int]) -> Route:
        """The route of a batch of these of its rows."""
        assert self.index is not None
        chosen = torch.tensor(rows, device="cpu")
        return Route(self.mixes, self.index[chosen], None if self.start is None else self.start[chosen])

    def tokens(self, past: int, length: int) -> Tensor:
        """The mix of each token where each has one, int64 [rows, length] on the CPU, from position `past` on."""
        assert self.index is not None
        places = torch.arange(past, past + length, device="cpu")
        if self.start is None:  # what a row generates wears the mix of its last token
            return self.index[:, places.clamp_(max=self.index.shape[1] - 1)]
        return torch.where(places < self.start.unsqueeze(1), self._base, self.index.unsqueeze(1))

    @property
    def before_start(self) -> Route:
        """What all rows wear as long as none has come to its start."""
        return Route((self.mixes[self._base],))

    @property
    def after_start(self) -> Route:
        """What the rows wear once each has come to its start."""
        assert self.index is not None
        last = len(self.mixes) - 1
        is_added = self._base == last and not bool((self.index == last).any())
        return Route(self.mixes[:last] if is_added else self.mixes, self.index)

    @property
    def of_rows(self) -> Tensor | None:
        """`index` where each row has a mix; None where all have one, or each token has."""
        return None if self.by_token else self.index

    @property
    def by_token(self) -> bool:
        """Whether each token has a mix of its own."""
        return self.start is not None or (self.index is not None and self.index.dim() == 2)

    @property
    def used(self) -> list[int]:
        """The places of the mixes that some row or token wears."""
        worn = [] if self.index is None else self.index.flatten().tolist()
        return sorted({*worn, *([] if self.start is None else [self._base])})

    @property
    def _base(self) -> int:
        return next(place for place, mix in enumerate(self.mixes) if not mix.rows)


def check_images(images: object, rows: int) -> list[int] | None:
    """The row of each image.

    Raises:
        ValueError: `images` do not hold one of so many rows each.
    """
    given = listed(images)
    if given is None:
        return None
    if not isinstance(given, Sequence) or not all(isinstance(row, int) and 0 <= row < rows for row in given):
        raise ValueError(f"images must hold the row of each image, 0 … {rows - 1}: got {images!r}")
    return list(given)


def check_index(index: object, mixes: int) -> None:
    """Raises ValueError where `index` is no tensor that says which of so many mixes each row or token wears."""
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dim() not in (1, 2) or not index.numel():
        raise ValueError("index must be an integer tensor of shape [batch] or [batch, tokens]")
    if index.min() < 0 or index.max() >= mixes:
        raise ValueError(f"index points outside of the {mixes} mixes: it must lie in 0 … {mixes - 1}")
