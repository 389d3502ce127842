"""The Triton backend's view of what the rows wear: tables that the kernels read, at addresses that stay."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ia3rt.adapters.device_table import DeviceTable
from ia3rt.adapters.resolved import ResolvedMix
from ia3rt.routing.staging import Staging

PRODUCT, LINEAR = 0, 1
_SLOTS = 64  # up to this many rows, batches of any size find one table
_MIX_SIZE = 8  # up to this, mixes of any size find one table


class MixTables:
    """What the kernels read beside the bank, on one device.

    Attributes:
        bank: by site, its column slice of the bank, [capacity, width]; without a column for a site that lies elsewhere.
        mixes: int32 [slots, 2 + 2 K], a mix a row: mode (0 product, 1 linear), count, K bank rows, K float32 weights
            as raw bits. K is the longest mix there is room for.
        route: int32 [R], the slot each row of the batch wears; R = 1 where all wear one.
        tokens: int64 [R], the same as `route`, where each token of the batch has a mix of its own; None elsewhere.
        layout: the shapes of `mixes` and `route`: R, slots, and the numbers of a slot.
        stays: whether `bank` is the bank's own table, and not made anew for each forward.
    """

    def __init__(self) -> None:
        self.bank: Sequence[Tensor] = ()
        self.mixes = torch.zeros(0, 2, dtype=torch.int32, device="cpu")
        self.route = torch.zeros(0, dtype=torch.int32, device="cpu")
        self.tokens: Tensor | None = None
        self.layout, self.stays = (0, 0, 0), True
        self._table: Tensor | None = None
        self._slots: list[int] | None = None  # what the route holds; None where that is on the device only
        self._mix_staging: Staging | None = None
        self._route_staging: Staging | None = None

    @classmethod
    def over(cls, bank: Sequence[Tensor], mixes: Tensor, route: Tensor) -> MixTables:
        """Tables over other rows than the bank's: by site, [rows, width]."""
        tables = cls()
        tables.bank, tables.mixes, tables.route = bank, mixes, route
        tables.stays = False
        tables._lay_out()
        return tables

    def by_token(self, tokens: Tensor) -> MixTables:
        """The same bank and mixes, and the mix of each token, [R]."""
        tables = MixTables()
        tables.bank, tables.mixes, tables.route, tables.stays = self.bank, self.mixes, tokens.int(), self.stays
        tables.tokens = tokens
        tables._lay_out()
        return tables

    def write(
        self, bank: DeviceTable, mixes: Sequence[ResolvedMix], rows: int, stream: torch.cuda.Stream | None
    ) -> None:
        """Writes the distinct mixes in use, in place where they fit into what was there before.

        There is room for a mix a row of the batch, so that a captured forward of so many rows holds under any route.
        """
        if bank.table is not self._table:
            self._table, self.bank = bank.table, bank.columns
            if self.mixes.device != bank.device:
                self._mix_staging = self._route_staging = None
        size = _MIX_SIZE
        for mix in mixes:
            size = max(size, len(mix.rows))
        _, slots, width = self.layout  # asking a tensor takes longer
        if self._mix_staging is None or max(rows, len(mixes)) > slots or 2 + 2 * size > width:
            slots, width = max(_SLOTS, rows, len(mixes), slots), 2 + 2 * size
            self.mixes = torch.zeros(slots, width, dtype=torch.int32, device=bank.device)
            self._mix_staging = Staging(self.mixes.view(-1))
            self._lay_out()
        turn = self._mix_staging.turn()
        _pack(turn.ints, turn.floats, mixes, width)
        turn.copy(len(mixes) * width, stream)

    def write_route(self, slots: list[int], stream: torch.cuda.Stream | None) -> None:
        """Writes which of the mixes each row wears; in place where as many rows were there before."""
        if self._route_staging is None or len(slots) != self.layout[0]:
            self.route = torch.empty(len(slots), dtype=torch.int32, device=self.mixes.device)
            self._route_staging, self._slots = Staging(self.route), None
            self._lay_out()
        if slots == self._slots:
            return  # as between any two switches of all rows
        self._slots = slots
        turn = self._route_staging.turn()
        turn.ints[: len(slots)] = [*slots]
        turn.copy(len(slots), stream)

    def _lay_out(self) -> None:
        self.layout = len(self.route), *self.mixes.shape


def pack_mixes(mixes: Sequence[ResolvedMix], size: int) -> Tensor:
    """Packs mixes of at most `size` adapters into rows of `MixTables.mixes`, int32 [len(mixes), 2 + 2 size]."""
    width = 2 + 2 * size
    # Not a tensor's memory: a tensor that is made while torch.func transforms a forward does not say where it is.
    ints = (ctypes.c_int32 * (len(mixes) * width))()
    _pack(ints, (ctypes.c_float * len(ints)).from_buffer(ints), mixes, width)
    return torch.frombuffer(ints, dtype=torch.int32).view(len(mixes), width)


def _pack(
    ints: ctypes.Array[ctypes.c_int32], floats: ctypes.Array[ctypes.c_float], mixes: Sequence[ResolvedMix], width: int
) -> None:
    """Lays mixes out as rows of `width` numbers; what is behind a mix's count is not read, and stays as it was."""
    start, size = 0, (width - 2) // 2
    for mix in mixes:
        ints[start] = PRODUCT if mix.weights is None else LINEAR
        ints[start + 1] = len(mix.rows)
        for place, row in enumerate(mix.rows, start + 2):  # a slice of ctypes takes as long as ten of its numbers
            ints[place] = row
        if mix.weights is not None:
            for place, weight in enumerate(mix.weights, start + 2 + size):
                floats[place] = weight
        start += width


def used_rows(mixes: Sequence[ResolvedMix]) -> tuple[list[int], list[ResolvedMix]]:
    """The rows of the bank that the mixes name, and the mixes with places in that list instead."""
    used = sorted({0, *(row for mix in mixes for row in mix.rows)})
    return used, [mix._replace(rows=tuple(used.index(row) for row in mix.rows)) for mix in mixes]
