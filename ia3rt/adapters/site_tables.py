"""Where the numbers of a bank lie: a table a device, and in one of them each site's columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from ia3rt.adapters.device_table import DeviceTable
from ia3rt.adapters.free_rows import FreeRows
from ia3rt.adapters.outside_modes import outside_modes
from ia3rt.adapters.site import Site, SiteKey

T = TypeVar("T")


class SiteTables:
    """Numbers [rows, total_width], a column slice a site, all ones at first.

    Where sites lie on several devices, each has a table with its sites' columns. A row has the same number in all.

    Args:
        sites: the columns, in this order.
        where: the device that a site lies on, or that all of them do.
        dtype: float32, or bfloat16 / float16 to halve the memory.
        rows: how many there are to begin with.

    Attributes:
        sites: by path and side, in the order of their columns; another mapping once there are more.
        where: as given; asked again where sites are added, or moved.
        tables: the numbers, a table a device; others once a row or a column was added, or a site lies elsewhere.
        places: which of them each site is in, in the order of the sites.
        is_settled: whether each site's columns are where it lies; not while modules are moved one after another.
        is_cuda: whether any table is on a CUDA device.
        dtype: of the numbers.

    Raises:
        ValueError: the dtype is another one.
    """

    @outside_modes
    def __init__(
        self, sites: Iterable[Site], where: torch.device | Callable[[Site], torch.device], dtype: torch.dtype, rows: int
    ) -> None:
        check_dtype(dtype)
        self.sites: dict[SiteKey, Site] = {site.key: site for site in sites}
        self.dtype = dtype
        self._free = FreeRows(rows)
        self.where = where
        self._noted: list[torch.device] = []  # where sites lie as far as is known, by position
        self._place(self._laid(self.sites, self._devices(self.sites), rows))

    @property
    def table(self) -> Tensor:
        """The numbers, [rows, total_width], where all sites lie on one device."""
        (only,) = self.tables
        return only.table

    @property
    def rows(self) -> int:
        """How many rows there are, the identity's included."""
        return len(self.tables[0].table)

    @property
    def nbytes(self) -> int:
        """The bytes of the numbers, on all devices together."""
        return sum(each.table.numel() for each in self.tables) * self.dtype.itemsize

    @property
    def widths(self) -> list[int]:
        """The sites' widths, in the order of their columns."""
        return [site.width for site in self.sites.values()]

    @property
    def total_width(self) -> int:
        """The length of a row: the sum of all sites' widths."""
        return sum(self.widths)

    @property
    def devices(self) -> dict[Site, torch.device]:
        """Where each site's numbers lie."""
        return {site: self.tables[at].device for site, at in zip(self.sites.values(), self.places, strict=True)}

    def by_site(self, of: Callable[[DeviceTable], Sequence[T]]) -> Sequence[T]:
        """What `of` gives by site for a table, of each site from the table that it is in."""
        given = [of(table) for table in self.tables]
        return given[0] if len(given) == 1 else [given[at][i] for i, at in enumerate(self.places)]

    def moved(self, position: int, device: torch.device) -> bool:
        """Says that a site lies on a device now. Whether all lie there now, and are to be settled.

        So a model that moves module by module moves its table once. What moves in part is settled by the next forward.
        """
        if self._noted[position] == device:
            return False
        self._noted[position] = device
        self.is_settled = False
        return all(each == device for each in self._noted)

    @outside_modes
    def settle(self) -> bool:
        """Brings each site's columns to where it lies. Whether any were elsewhere.

        Those of a site whose weights are away, on the meta device, stay where they are: there they would be lost.
        """
        known = (self.tables[at].device for at in self.places)
        there = zip(self._devices(self.sites), known, strict=True)
        devices = [at if each.type == "meta" else each for each, at in there]
        self.is_settled, self._noted = True, devices
        if all(self.tables[at].device == each for at, each in zip(self.places, devices, strict=True)):
            return False
        self._free.wait_for([*self._free.arriving])
        columns = self.by_site(lambda here: here.columns)
        if len(self.tables) == 1 and len(set(devices)) == 1:
            self._place((DeviceTable(self.table.to(devices[0]), self.widths, self.widths),))
            return True
        tables = self._laid(self.sites, devices, self.rows)
        for table in tables:
            for column, width, before in zip(table.columns, table.widths, columns, strict=True):
                if width:
                    column.copy_(before)
        self._place(tables)
        return True

    def _grow(self, sites: dict[SiteKey, Site], rows: int) -> None:
        """Makes the tables longer, of so many rows, and adds the columns of the sites that they lack."""
        self._free.wait_for([*self._free.arriving])
        capacity, before = self.rows, {each.device: each for each in self.tables}
        known = [self.tables[at].device for at in self.places]
        added = dict(islice(sites.items(), len(known), None))
        tables = self._laid(sites, [*known, *self._devices(added)], rows)
        for each in tables:
            if each.device in before:
                old = before[each.device]
                each.table[:capacity, : old.table.shape[1]] = old.table
                if each.table.is_cuda:  # whoever reads it next may do so in another stream
                    torch.cuda.current_stream(each.device).synchronize()
        self.sites = sites
        self._place(tuple(each.as_read(before[each.device]) if each.device in before else each for each in tables))
        self._free.rows[:0] = range(rows - 1, capacity - 1, -1)

    def _devices(self, sites: Mapping[SiteKey, Site]) -> list[torch.device]:
        """Where each of these sites lies."""
        where = self.where
        return [where if isinstance(where, torch.device) else where(site) for site in sites.values()]

    def _laid(
        self, sites: Mapping[SiteKey, Site], devices: Sequence[torch.device], rows: int
    ) -> tuple[DeviceTable, ...]:
        """Tables of ones, with these sites' columns where they lie."""
        whole, tables = [site.width for site in sites.values()], []
        anywhere = self.where if isinstance(self.where, torch.device) else torch.device("cpu")
        for device in dict.fromkeys(devices) or [anywhere]:
            widths = [width if at == device else 0 for at, width in zip(devices, whole, strict=True)]
            table = torch.ones(rows, sum(widths), device=device, dtype=self.dtype)
            tables.append(DeviceTable(table, widths, whole))
        return tuple(tables)

    def _place(self, tables: tuple[DeviceTable, ...]) -> None:
        self.tables = tables
        places = range(len(self.sites))
        self.places = [next((at for at, each in enumerate(tables) if each.widths[i]), 0) for i in places]
        self._noted = [tables[at].device for at in self.places]
        self.is_settled = True
        self.is_cuda = any(each.table.is_cuda for each in tables)


def check_dtype(dtype: object) -> None:
    """Raises ValueError where a bank's vectors cannot be of it; a dtype's name is no dtype."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the bank's dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}")
