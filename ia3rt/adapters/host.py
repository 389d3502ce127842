"""Adapters in the host's memory, laid out as rows of the bank: they need not be read again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ia3rt.adapters.adapter import Stamp
from ia3rt.adapters.site import Site


@dataclass(frozen=True, eq=False)
class HostRow:
    """An adapter as it was read.

    Attributes:
        folder: from where.
        stamp: its files then.
        row: its numbers, [the bank's width then], in the bank's dtype; in pinned memory where the bank is on CUDA.
        sites: where it acts.
        shared: at which of them experts share a vector.
        config: its adapter_config.json.
    """

    folder: Path
    stamp: Stamp
    row: Tensor
    sites: frozenset[Site]
    shared: frozenset[Site]
    config: dict[str, Any] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The bytes of its numbers; of pinned memory torch gives powers of two."""
        size = self.row.numel() * self.row.element_size()
        return 1 << (size - 1).bit_length() if self.row.is_pinned() else size


class HostTier:
    """Rows by name, of which those used least recently go where they are too many.

    Args:
        limit: bytes that the rows may have together.

    Attributes:
        nbytes: what they have.
        evictions: how many went so far.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = self.evictions = 0
        self._rows: OrderedDict[str, HostRow] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._rows)

    def get(self, name: str) -> HostRow | None:
        """An adapter's row, which is then used last; None where there is none."""
        with self._lock:
            if name in self._rows:
                self._rows.move_to_end(name)
            return self._rows.get(name)

    def put(self, name: str, row: HostRow) -> None:
        """Keeps a row, if it fits, in the place of an earlier one of this name."""
        size = row.nbytes
        with self._lock:
            self._drop(name)
            if size > self.limit:
                return
            while self.nbytes + size > self.limit:
                self._drop(next(iter(self._rows)))
                self.evictions += 1
            self._rows[name] = row
            self.nbytes += size

    def drop(self, name: str) -> None:
        """Forgets a row, if there is one."""
        with self._lock:
            self._drop(name)

    def _drop(self, name: str) -> None:
        row = self._rows.pop(name, None)
        if row is not None:
            self.nbytes -= row.nbytes
