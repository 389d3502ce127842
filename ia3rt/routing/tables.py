"""The Triton backend's view of what the rows wear: tables that the kernels read, at addresses that stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ia3rt.adapters.bank import Bank, ResolvedMix

PRODUCT, LINEAR = 0, 1
_SLOTS = 64  # up to this many rows, batches of any size find one table
_MIX_SIZE = 8  # up to this, the kernels can scale the input of a few rows within the matmul


class MixTables:
    """What the kernels read beside the bank.

    Attributes:
        bank: by site, its column slice of the bank, [capacity, width].
        mixes: int32 [slots, 2 + 2 K], a mix a row: mode (0 product, 1 linear), count, K bank rows, K float32 weights
            as raw bits. K is the longest mix there is room for.
        route: int32 [R], the slot each row of the batch wears; R = 1 where all wear one.
    """

    def __init__(self) -> None:
        self.bank: tuple[Tensor, ...] = ()
        self.mixes = torch.zeros(0, 2, dtype=torch.int32)
        self.route = torch.zeros(0, dtype=torch.int32)
        self._table: Tensor | None = None

    @classmethod
    def over(cls, rows: Tensor, widths: list[int], mixes: Tensor, route: Tensor) -> MixTables:
        """Tables over other rows than the bank's: [rows, total_width], split at the sites' widths."""
        tables = cls()
        tables.bank, tables.mixes, tables.route = torch.split(rows, widths, dim=1), mixes, route
        return tables

    def write(self, bank: Bank, mixes: Sequence[ResolvedMix], rows: int) -> None:
        """Writes the distinct mixes in use, in place where they fit into what was there before.

        There is room for a mix a row of the batch, so that a captured forward of so many rows holds under any route.
        """
        device = bank.table.device
        if bank.table is not self._table:
            self._table = bank.table
            self.bank = torch.split(bank.table, bank.widths, dim=1)
        size = max(_MIX_SIZE, *(len(mix.rows) for mix in mixes))
        slots = max(_SLOTS, rows, len(mixes), len(self.mixes))
        if self.mixes.device != device or len(self.mixes) < slots or self.mixes.shape[1] < 2 + 2 * size:
            self.mixes = torch.zeros(slots, 2 + 2 * size, dtype=torch.int32, device=device)
        self.mixes[: len(mixes)].copy_(pack_mixes(mixes, (self.mixes.shape[1] - 2) // 2))

    def write_route(self, index: Tensor) -> None:
        """Writes which of the mixes each row wears, integers [R]; in place where as many were there before."""
        device = self.mixes.device
        if self.route.device != device or self.route.shape != index.shape:
            self.route = torch.empty(index.shape, dtype=torch.int32, device=device)
        self.route.copy_(index)


def pack_mixes(mixes: Sequence[ResolvedMix], size: int) -> Tensor:
    """Packs mixes of at most `size` adapters into rows of `MixTables.mixes`, int32 [len(mixes), 2 + 2 size]."""
    packed = torch.zeros(len(mixes), 2 + 2 * size, dtype=torch.int32)
    weights = packed[:, 2 + size :].view(torch.float32)
    for slot, mix in enumerate(mixes):
        count = len(mix.rows)
        packed[slot, 0] = PRODUCT if mix.weights is None else LINEAR
        packed[slot, 1] = count
        packed[slot, 2 : 2 + count] = torch.tensor(mix.rows, dtype=torch.int32)
        weights[slot, :count] = torch.tensor(mix.weights or [1.0] * count)
    return packed


def used_rows(mixes: Sequence[ResolvedMix]) -> tuple[list[int], list[ResolvedMix]]:
    """The rows of the bank that the mixes name, and the mixes with places in that list instead."""
    used = sorted({0, *(row for mix in mixes for row in mix.rows)})
    return used, [mix._replace(rows=tuple(used.index(row) for row in mix.rows)) for mix in mixes]
