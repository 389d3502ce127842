"""The torch backend's view of what the rows wear: each mix multiplied or summed out once, when it is set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ia3rt.adapters.bank import Bank, ResolvedMix
from ia3rt.adapters.pieces import pieces
from ia3rt.adapters.site import Site
from ia3rt.routing.staging import Staging


class Scales(Protocol):
    """What each site wears."""

    def scale(self, position: int) -> Tensor:
        """[width] where all rows wear one mix, else [rows, width], or [mixes, width] where tokens are routed.

        Args:
            position: the site's in the bank.
        """
        ...


class ComposedMixes:
    """A composed float32 vector a site for each mix in use or each row, in buffers that stay where they are."""

    def __init__(self) -> None:
        self._scales: tuple[Tensor, ...] = ()
        self._whole = torch.empty(0)
        self._starts: tuple[int, ...] = ()
        self._ends: tuple[int, ...] = ()
        self._buffer = torch.empty(0, 0)
        self._rows: list[tuple[Tensor, ...]] = []
        self._columns: tuple[Tensor, ...] = ()
        self._table: Tensor | None = None
        self._index = torch.empty(0, dtype=torch.int32)
        self._staging: Staging | None = None

    def scale(self, position: int) -> Tensor:
        """As `Scales.scale`; ones at a site that the model got since, as none of these mixes acts there."""
        if torch.compiler.is_compiling():
            # One input to the graph and not one a site: each costs its checks at every call.
            return self._whole[..., self._starts[position] : self._ends[position]]
        try:
            return self._scales[position]
        except IndexError:
            return self._whole.new_ones(())

    def write(self, bank: Bank, mixes: Sequence[ResolvedMix], rows: list[int] | None) -> None:
        """Composes `mixes`; in place where as many rows were there before, so that a captured forward holds.

        Args:
            bank: the adapters.
            mixes: the distinct mixes in use.
            rows: the mix of each row; None keeps one row a mix.
        """
        count = len(mixes) if rows is None else len(rows)
        if bank.table is not self._table or count != len(self._buffer):
            self._table = bank.table
            self._columns = pieces(bank.table)
            self._buffer = torch.empty(count, bank.total_width, device=bank.table.device)
            self._rows = [pieces(row) for row in self._buffer]
            self._index = torch.empty(count, dtype=torch.int32, device=bank.table.device)
            self._staging = None if bank.table.is_cpu else Staging(self._index)
            self._whole = self._buffer[0] if count == 1 else self._buffer
            self._starts = tuple(accumulate(bank.widths[:-1], initial=0))
            self._ends = tuple(accumulate(bank.widths))
            self._scales = torch.split(self._whole, bank.widths, dim=-1)
        if rows is None:
            for out, mix in zip(self._rows, mixes, strict=True):
                _compose_into(out, self._columns, mix)
            return
        composed = self._buffer.new_empty(len(mixes), bank.total_width)
        distinct = [pieces(row) for row in composed]
        for out, mix in zip(distinct, mixes, strict=True):
            _compose_into(out, self._columns, mix)
        if self._staging is not None:
            turn = self._staging.turn()
            turn.ints[:count] = [*rows]
            turn.copy(count)
            torch.index_select(composed, 0, self._index, out=self._buffer)
            return
        for out, slot in zip(self._rows, rows, strict=True):
            for piece, source in zip(out, distinct[slot], strict=True):
                piece.copy_(source)


def _compose_into(out: Sequence[Tensor], columns: Sequence[Tensor], mix: ResolvedMix) -> None:
    """Writes a mix's composed row.

    Args:
        out: the row's pieces, float32, overwritten.
        columns: the bank's, [capacity, numbers] each.
        mix: what to compose, in the order of its rows, in float32.
    """
    for piece, table in zip(out, columns, strict=True):
        if mix.weights is not None:
            piece.zero_()
            for row, weight in zip(mix.rows, mix.weights, strict=True):
                piece.add_(table[row].float() * weight)  # rounded before it is added, as in PEFT
        elif mix.rows:
            piece.copy_(table[mix.rows[0]])
            for row in mix.rows[1:]:
                piece.mul_(table[row])
        else:
            piece.fill_(1.0)


def composed_vectors(bank: Bank, mix: ResolvedMix) -> dict[Site, Tensor]:
    """A mix's composed vectors, float32 [width] each, at the sites where any of its adapters acts."""
    row = torch.empty(bank.total_width, device=bank.table.device)
    _compose_into(pieces(row), pieces(bank.table), mix)
    acts: frozenset[Site] = frozenset().union(*(adapter.sites for adapter in mix.adapters))
    vectors = list(zip(bank.sites.values(), torch.split(row, bank.widths), strict=True))
    for site, vector in vectors:
        if site.slices is not None:  # where no adapter acts a weighted sum is 1, and not 1 but for rounding
            vector[site.slices.outside(site.width).to(vector.device)] = 1.0
    return {site: vector for site, vector in vectors if site in acts}
