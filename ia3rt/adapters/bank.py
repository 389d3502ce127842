"""The bank: the vectors of all resident adapters, a row an adapter, a column slice a site, a table a device."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.device_table import DeviceTable
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.outside_modes import outside_modes
from ia3rt.adapters.packing import all_sites, pack
from ia3rt.adapters.residents import Residents
from ia3rt.adapters.resolved import ResolvedMix, rest_of
from ia3rt.adapters.site import Site
from ia3rt.adapters.site_tables import SiteTables
from ia3rt.adapters.together import check_modules


class Bank(SiteTables):
    """The vectors [rows, total_width] of all resident adapters; row 0 is the identity, and so is a site that an adapter
    lacks.

    Args:
        sites: the columns, in this order.
        where: the device that a site lies on, or that all of them do.
        dtype: float32, or bfloat16 / float16 to halve the memory.
        capacity: rows to begin with, besides the identity's.
        grows: whether the table doubles when they are used up, and gets columns for new sites. Else it stays where it
            is and as large as it is, and adapters that were registered make room for others.

    Attributes:
        adapters: those that are resident, by name, and which of them may make room.
        grows: as given.
        lock: of all that changes the bank or what is worn.
        release: lets go of what is held in case it is wanted again; called before a row is refused.

    Raises:
        ValueError: the dtype is another one, or there is no row for an adapter.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        where: torch.device | Callable[[Site], torch.device],
        dtype: torch.dtype,
        capacity: int,
        grows: bool = True,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"the bank's capacity must be at least 1 adapter, got {capacity}")
        super().__init__(sites, where, dtype, capacity + 1)
        self.adapters = Residents(self._free.rows)
        self.grows = grows
        self.lock = threading.RLock()
        self.release: Callable[[], object] = lambda: None
        self._placed: list[str] | None = None  # what `all_or_nothing` takes back

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        """The same adapters in a table of their own; locks and streams are no part of it."""
        made = memo[id(self)] = Bank.__new__(Bank)
        left = {"lock", "release", "tables"}
        with self.lock:  # or a row might be copied before it is written, and its adapter after that
            vars(made).update(copy.deepcopy({name: own for name, own in vars(self).items() if name not in left}, memo))
            made.lock, made.release = threading.RLock(), lambda: None
            free = made._free.rows
            held = {each.row for each in memo.values() if isinstance(each, Adapter) and each.free is free}
            # Rows of adapters that are in no copy, as only forwards and routes hold them, are free in this one.
            free[:0] = [row for row in range(1, self.rows) if row not in held and row not in free]
            whole = self.widths
            made._place(tuple(DeviceTable(each.table.clone(), each.widths, whole) for each in self.tables))
        return made

    def resolve(self, mix: Mix) -> ResolvedMix:
        """Looks the mix's adapters up.

        Raises:
            ValueError: one of them is not resident.
        """
        resident, free = self.adapters, self._free
        for name in mix.adapters:
            if name in resident.evictable:
                resident.evictable.move_to_end(name)
        single = resident.singles.get(mix.adapters[0]) if len(mix.adapters) == 1 and mix.weights is None else None
        if single is not None:  # nearly every mix is of this kind
            if free.arriving:
                free.wait_for(single.rows)
            return single
        adapters = tuple(map(resident.find, mix.adapters))
        check_modules(adapters)
        rows, weights = tuple(adapter.row for adapter in adapters), mix.weights
        complement = None
        if weights is not None and (rest := rest_of(mix)):
            if mix.combination_type == "delta":
                rows, weights = (0, *rows), (rest, *weights)
            else:
                complement = self._complement(frozenset().union(*(adapter.sites for adapter in adapters)))
                rows, weights = (*rows, complement.row), (*weights, rest)
        if free.arriving:
            free.wait_for(rows)
        return ResolvedMix(mix, adapters, rows, weights, complement)

    @outside_modes
    def add(
        self,
        name: str,
        vectors: Mapping[Site, Tensor],
        config: dict[str, Any] | None = None,
        modules: frozenset[str] = frozenset(),
        embeddings: frozenset[str] = frozenset(),
    ) -> Adapter:
        """Makes an adapter resident: one copy into a free row. Either all of it happens or nothing.

        The table is another tensor afterwards where a row or a column had to be added.

        Raises:
            ValueError: as `Residents.check_name` and `pack`; or it does not grow, and the adapter acts at a new site.
            NoRowError: it does not grow, and no row can be had.
        """
        self.adapters.check_name(name)
        row = pack(name, vectors, self.sites, self.dtype)
        sites = all_sites(self.sites, vectors)
        if len(sites) > len(self.sites):
            if not self.grows:
                raise ValueError(
                    f"adapter {name!r} acts at {list(sites.values())[len(self.sites)]}, where the model has no site, "
                    "and the bank does not grow: name the module in patch(target_modules=…), or leave grow=False out"
                )
            self._grow(sites, self.rows if self._free.rows else 2 * self.rows)
        self.make_room(1)
        shared = frozenset(site for site, vector in vectors.items() if vector.numel() < site.width)
        made = Adapter(name, 0, frozenset(vectors), dict(config or {}), modules, embeddings, shared=shared)
        return self.place(made, row)

    @outside_modes
    def place(self, adapter: Adapter, row: Tensor) -> Adapter:
        """Makes an adapter resident in a free row, of which `make_room` saw that there is one.

        Args:
            adapter: it, of no row yet.
            row: its numbers, as `pack` laid them out when the bank had no more columns than now.
        """
        with self._free.writing(self.tables) as index:
            for table in self.tables:
                table.write(index, row)
        adapter.row, adapter.free = index, self._free.rows
        self.adapters.hold(adapter)
        if self._placed is not None:
            self._placed.append(adapter.name)
        return adapter

    def make_room(self, count: int) -> None:
        """Sees that so many rows are free: grows, or lets go of registered adapters that nobody wears.

        Raises:
            NoRowError: that is not enough. Everything is as it was then.
        """
        while self.grows and len(self._free.rows) < count:
            self._grow(self.sites, 2 * self.rows)
        if len(self._free.rows) < count:
            self.adapters.make_room(count, self.rows - 1, self.release)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """A context that takes back what was added in it, rows and columns too, if it ends with an exception."""
        tables, sites, free = self.tables, self.sites, self._free.rows
        placed = self._placed = []  # a copy of all names would take longer the more there are
        try:
            yield
        except BaseException:
            for name in placed:
                adapter = self.adapters.forget(name)
                free.append(adapter.row)
                adapter.free = []  # whenever it dies, its row was freed here
            self.sites = sites
            self._place(tables)
            free[:] = [row for row in free if row < self.rows]
            raise
        finally:
            self._placed = None

    def vectors(self, adapter: Adapter) -> dict[Site, Tensor]:
        """A resident adapter's vectors, [width] each, one a site for all experts there: views of its row."""
        columns = self.by_site(lambda here: torch.split(here.table[adapter.row], here.widths))
        return {
            site: column for site, column in zip(self.sites.values(), columns, strict=True) if site in adapter.sites
        }

    def distinct(self, adapter: Adapter) -> dict[Site, Tensor]:
        """The same without repeating: [width_of_one] at experts that share a vector."""
        vectors = self.vectors(adapter).items()
        return {site: vector[: site.width_of_one] if site in adapter.shared else vector for site, vector in vectors}

    @outside_modes
    def _complement(self, acts: frozenset[Site]) -> Adapter:
        """The row that is 0 at these sites and 1 elsewhere, also at sites that the bank gets later."""
        known = self.adapters.complements
        if acts not in known:
            self.make_room(1)
            with self._free.writing(self.tables) as row:
                for here in self.tables:
                    here.table[row].fill_(1.0)
                rows = self.by_site(lambda here: torch.split(here.table[row], here.widths))
                for site, columns in zip(self.sites.values(), rows, strict=True):
                    if site in acts:  # of a fused layer, in its slices only
                        columns[... if site.slices is None else site.slices.inside(columns.device)] = 0.0
            known[acts] = Adapter("", row, frozenset(), free=self._free.rows)
        return known[acts]
