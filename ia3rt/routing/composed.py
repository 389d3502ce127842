"""The torch backend's view of what the rows wear: each mix multiplied or summed out once, when it is set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.device_table import DeviceTable
from ia3rt.adapters.pieces import pieces
from ia3rt.adapters.resolved import ResolvedMix
from ia3rt.adapters.site import Site
from ia3rt.routing.staging import Staging
from ia3rt.routing.streams import current_stream


class Scales(Protocol):
    """What each site wears.

    Attributes:
        is_written: whether what is worn was written here.
    """

    is_written: bool

    def scale(self, position: int) -> Tensor:
        """[width] where all rows wear one mix, else [rows, width], or [mixes, width] where tokens are routed.

        Args:
            position: the site's in the bank.
        """
        ...


class ComposedMixes:
    """A composed float32 vector a site for each mix in use or each row, in buffers that stay where they are."""

    def __init__(self) -> None:
        self.is_written = False
        self._scales: Sequence[Tensor] = ()
        self._wholes: tuple[Tensor, ...] = ()
        self._places: Sequence[int] = ()
        self._starts: Sequence[int] = ()
        self._ends: Sequence[int] = ()
        self._buffers: list[_Buffer] = []
        self._count = 0
        self._tables: tuple[DeviceTable, ...] = ()

    def scale(self, position: int) -> Tensor:
        """As `Scales.scale`; ones at a site that the model got since, as none of these mixes acts there."""
        if torch.compiler.is_compiling():
            # One input to the graph for each device and not one a site: each costs its checks at every call.
            return self._wholes[self._places[position]][..., self._starts[position] : self._ends[position]]
        try:
            return self._scales[position]
        except IndexError:
            return torch.ones((), dtype=torch.float32, device="cpu")  # which multiplies on any device

    def write(self, bank: Bank, mixes: Sequence[ResolvedMix], rows: list[int] | None) -> None:
        """Composes `mixes`; in place where as many rows were there before, so that a captured forward holds.

        Args:
            bank: the adapters.
            mixes: the distinct mixes in use.
            rows: the mix of each row; None keeps one row a mix.
        """
        count = len(mixes) if rows is None else len(rows)
        if bank.tables is not self._tables or count != self._count:
            self._places = tuple(bank.places)
            self._buffers = [_Buffer(table, count) for table in bank.tables]
            of = dict(zip(bank.tables, self._buffers, strict=True))
            self._wholes = tuple(buffer.whole for buffer in self._buffers)
            self._scales = bank.by_site(lambda here: torch.split(of[here].whole, here.widths, dim=-1))
            self._ends = bank.by_site(lambda here: tuple(accumulate(here.widths)))
            self._starts = tuple(end - width for end, width in zip(self._ends, bank.widths, strict=True))
            self._tables, self._count = bank.tables, count
        for buffer in self._buffers:
            buffer.write(mixes, rows)
        self.is_written = True


class _Buffer:
    """What is composed on one device.

    Args:
        table: the bank's vectors there.
        count: how many rows are composed.

    Attributes:
        whole: [width] where that is one, else [count, width].
    """

    def __init__(self, table: DeviceTable, count: int) -> None:
        self._columns = pieces(table.table)
        self._buffer = torch.empty(count, table.table.shape[1], dtype=torch.float32, device=table.device)
        self._rows = [pieces(row) for row in self._buffer]
        self._index = torch.empty(count, dtype=torch.int32, device=table.device)
        self._staging = None if table.table.is_cpu else Staging(self._index)
        self.whole = self._buffer[0] if count == 1 else self._buffer

    def write(self, mixes: Sequence[ResolvedMix], rows: list[int] | None) -> None:
        """As `ComposedMixes.write`."""
        if rows is None:
            for out, mix in zip(self._rows, mixes, strict=True):
                _compose_into(out, self._columns, mix)
            return
        if self._staging is not None:
            composed = self._buffer.new_empty(len(mixes), self._buffer.shape[1])
            for row, mix in zip(composed, mixes, strict=True):
                _compose_into(pieces(row), self._columns, mix)
            turn, count = self._staging.turn(), len(rows)
            turn.ints[:count] = [*rows]
            turn.copy(count, current_stream(self.whole.device) if self.whole.is_cuda else None)
            torch.index_select(composed, 0, self._index, out=self._buffer)
            return
        first: dict[int, Sequence[Tensor]] = {}
        for out, slot in zip(self._rows, rows, strict=True):
            if slot not in first:
                _compose_into(out, self._columns, mixes[slot])
                first[slot] = out
                continue
            for piece, source in zip(out, first[slot], strict=True):
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

    def composed(here: DeviceTable) -> Sequence[Tensor]:
        row = torch.empty(here.table.shape[1], dtype=torch.float32, device=here.device)
        _compose_into(pieces(row), pieces(here.table), mix)
        return torch.split(row, here.widths)

    acts: frozenset[Site] = frozenset().union(*(adapter.sites for adapter in mix.adapters))
    vectors = list(zip(bank.sites.values(), bank.by_site(composed), strict=True))
    for site, vector in vectors:
        if site.slices is not None:  # where no adapter acts a weighted sum is 1, and not 1 but for rounding
            vector[site.slices.outside(site.width).to(vector.device)] = 1.0
    return {site: vector for site, vector in vectors if site in acts}
