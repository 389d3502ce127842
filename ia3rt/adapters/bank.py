"""The bank: the vectors of all resident adapters, a row an adapter, a column slice a site, a table a device."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.device_table import DeviceTable
from ia3rt.adapters.inference_mode import outside_inference_mode
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.packing import all_sites, pack
from ia3rt.adapters.resolved import ResolvedMix, rest_of
from ia3rt.adapters.shortened import some
from ia3rt.adapters.site import Site, SiteKey
from ia3rt.adapters.together import check_modules

T = TypeVar("T")


def _nothing() -> None:
    """Nothing."""


def _collect() -> None:
    """Finds what only garbage in cycles holds, of lately: all of it takes as long as hundreds of switches."""
    gc.collect(1)


def _collect_all() -> None:
    """The same of all that there is, as a last resort: what an error in compiled code held may have grown old."""
    gc.collect()


def _all_sites(of_each: Iterable[frozenset[Site]]) -> frozenset[Site]:
    return frozenset().union(*of_each)


class NoRowError(ValueError):
    """The bank does not grow, and every row of it is pinned, worn or an adapter's that was not registered."""


class Bank:
    """The vectors [rows, total_width] of all resident adapters; row 0 is the identity, and so is a site that an adapter
    lacks.

    Where sites lie on several devices, each has a table with its sites' columns. A row has the same number in all.

    Args:
        sites: the columns, in this order.
        where: the device that a site lies on, or that all of them do.
        dtype: float32, or bfloat16 / float16 to halve the memory.
        capacity: rows to begin with, besides the identity's.
        grows: whether the table doubles when they are used up, and gets columns for new sites. Else it stays where it
            is and as large as it is, and adapters that were registered make room for others.

    Attributes:
        where: as given; asked again where sites are added, or moved.
        tables: the vectors, a table a device; others once a row or a column was added, or a site lies elsewhere.
        places: which of them each site is in, in the order of the sites.
        is_settled: whether each site's columns are where it lies; not while modules are moved one after another.
        is_cuda: whether any table is on a CUDA device.
        dtype: of the vectors.
        evictable: the names of those that may make room, the one used least recently first.
        pinned: the names of registered adapters that may not.
        evictions: how many made room so far.
        lock: of all that changes the bank or what is worn.
        release: lets go of what is held in case it is wanted again; called before a row is refused.
    """

    @outside_inference_mode
    def __init__(
        self,
        sites: Iterable[Site],
        where: torch.device | Callable[[Site], torch.device],
        dtype: torch.dtype,
        capacity: int,
        grows: bool = True,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"the bank's dtype must be float32, bfloat16 or float16, got {dtype}")
        if capacity < 1:
            raise ValueError(f"the bank's capacity must be at least 1 adapter, got {capacity}")
        self.sites: dict[SiteKey, Site] = {site.key: site for site in sites}
        self.adapters: dict[str, Adapter] = {}
        self.grows = grows
        self.dtype = dtype
        self.evictable: OrderedDict[str, None] = OrderedDict()
        self.pinned: set[str] = set()
        self.evictions = 0
        self.lock = threading.RLock()
        self.release: Callable[[], object] = _nothing
        self.where = where
        self._noted: list[torch.device] = []  # where sites lie as far as is known, by position
        self._singles: dict[str, ResolvedMix] = {}
        self._arriving: dict[int, list[torch.cuda.Event]] = {}
        self._placed: list[str] | None = None  # what `all_or_nothing` takes back
        self._place(self._laid(self.sites, self._devices(self.sites), capacity + 1))
        self._free = list(range(capacity, 0, -1))
        self._complements: dict[frozenset[Site], Adapter] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        """The same adapters in a table of their own; locks and streams are no part of it."""
        made = memo[id(self)] = Bank.__new__(Bank)
        left = {"lock", "release", "tables", "_arriving"}
        with self.lock:  # or a row might be copied before it is written, and its adapter after that
            for event in (each for events in self._arriving.values() for each in events):
                event.synchronize()
            vars(made).update(copy.deepcopy({name: own for name, own in vars(self).items() if name not in left}, memo))
            made.lock, made.release, made._arriving = threading.RLock(), _nothing, {}
            whole = self.widths
            made._place(tuple(DeviceTable(each.table.clone(), each.widths, whole) for each in self.tables))
        return made

    @property
    def table(self) -> Tensor:
        """The vectors, [rows, total_width], where all sites lie on one device."""
        (only,) = self.tables
        return only.table

    @property
    def rows(self) -> int:
        """How many rows there are, the identity's included."""
        return len(self.tables[0].table)

    @property
    def nbytes(self) -> int:
        """The bytes of the vectors, on all devices together."""
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
        """Where each site's vectors lie."""
        return {site: self.tables[at].device for site, at in zip(self.sites.values(), self.places, strict=True)}

    def by_site(self, of: Callable[[DeviceTable], Sequence[T]]) -> Sequence[T]:
        """What `of` gives by site for a table, of each site from the table that it is in."""
        given = [of(table) for table in self.tables]
        return given[0] if len(given) == 1 else [given[at][i] for i, at in enumerate(self.places)]

    def resolve(self, mix: Mix) -> ResolvedMix:
        """Looks the mix's adapters up.

        Raises:
            ValueError: one of them is not resident.
        """
        for name in mix.adapters:
            if name in self.evictable:
                self.evictable.move_to_end(name)
        single = self._singles.get(mix.adapters[0]) if len(mix.adapters) == 1 and mix.weights is None else None
        if single is not None:  # nearly every mix is of this kind
            if self._arriving:
                self._await(single.rows)
            return single
        adapters = tuple(map(self.adapter, mix.adapters))
        check_modules(adapters)
        rows, weights = tuple(adapter.row for adapter in adapters), mix.weights
        complement = None
        if weights is not None and (rest := rest_of(mix)):
            if mix.combination_type == "delta":
                rows, weights = (0, *rows), (rest, *weights)
            else:
                complement = self._complement(_all_sites(adapter.sites for adapter in adapters))
                rows, weights = (*rows, complement.row), (*weights, rest)
        if self._arriving:
            self._await(rows)
        return ResolvedMix(mix, adapters, rows, weights, complement)

    def adapter(self, name: str) -> Adapter:
        """A resident adapter.

        Raises:
            ValueError: none of this name is resident.
        """
        if name not in self.adapters:
            raise ValueError(f"unknown adapter {name!r}: load it first (loaded: {some(self.adapters)})")
        return self.adapters[name]

    def check_name(self, name: str) -> None:
        """Raises ValueError where no new adapter can have this name."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"an adapter's name must be a string that is not empty, got {name!r}")
        if name in self.adapters:
            raise ValueError(
                f"an adapter named {name!r} is already loaded: delete_adapter it first, or use another name"
            )

    @outside_inference_mode
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
            ValueError: as `check_name` and `pack`; or it does not grow, and the adapter acts at a new site.
            NoRowError: it does not grow, and no row can be had.
        """
        self.check_name(name)
        row = pack(name, vectors, self.sites, self.dtype)
        sites = all_sites(self.sites, vectors)
        if len(sites) > len(self.sites):
            if not self.grows:
                raise ValueError(
                    f"adapter {name!r} acts at {list(sites.values())[len(self.sites)]}, where the model has no site, "
                    "and the bank does not grow: name the module in patch(target_modules=…), or leave grow=False out"
                )
            self._grow(sites)
        self.make_room(1)
        shared = frozenset(site for site, vector in vectors.items() if vector.numel() < site.width)
        made = Adapter(name, 0, frozenset(vectors), dict(config or {}), modules, embeddings, shared=shared)
        return self.place(made, row)

    @outside_inference_mode
    def place(self, adapter: Adapter, row: Tensor) -> Adapter:
        """Makes an adapter resident in a free row, of which `make_room` saw that there is one.

        Args:
            adapter: it, of no row yet.
            row: its numbers, as `pack` laid them out when the bank had no more columns than now.
        """
        with self._writing() as index:
            for table in self.tables:
                table.write(index, row)
        adapter.row, adapter.free = index, self._free
        self._hold(adapter)
        if self._placed is not None:
            self._placed.append(adapter.name)
        return adapter

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """A context in which a free row is written, which is free again if that fails.

        On a CUDA device the current stream waits for those that may still read what was in it, and who resolves a mix
        with it waits for what is written.
        """
        index = self._free.pop()
        try:
            for table in self.tables:
                table.wait_for_readers()
            self._await((index,))
            yield index
            arriving = [event for table in self.tables if (event := table.written()) is not None]
            if arriving:
                self._arriving[index] = arriving
        except BaseException:
            self._free.append(index)
            raise

    def make_room(self, count: int) -> None:
        """Sees that so many rows are free: grows, or lets go of registered adapters that nobody wears.

        Raises:
            NoRowError: that is not enough. Everything is as it was then.
        """
        while self.grows and len(self._free) < count:
            self._grow(self.sites)
        if len(self._free) >= count:
            return
        gone: list[dict[str, Any]] = []
        for release in (_nothing, self.release, _collect, _collect_all):
            release()
            for acts in list(self._complements):
                if len(self._free) < count:
                    self._let_go_complement(acts)
            for _ in range(len(self.evictable)):
                if len(self._free) < count:
                    self._let_go(next(iter(self.evictable)), gone)
            if len(self._free) >= count:
                self.evictions += len(gone)
                return
        refused = self._all_held(count)
        for own in reversed(gone):
            self._free.remove(own["row"])
            own.pop("site_in_experts", None)
            self._hold(Adapter(**own))
            self.evictable.move_to_end(own["name"], last=False)
        raise NoRowError(refused)

    def _let_go(self, name: str, gone: list[dict[str, Any]]) -> None:
        """Evicts an adapter, or moves it to the end where somebody holds it, which is a use of it."""
        adapter = self.adapters.pop(name)
        del self._singles[name]
        own, held = vars(adapter).copy(), weakref.ref(adapter)
        del adapter
        still = held()
        if still is None:
            del self.evictable[name]
            gone.append(own)
            return
        self._hold(still)
        self.evictable.move_to_end(name)

    def _let_go_complement(self, acts: frozenset[Site]) -> None:
        held = weakref.ref(self._complements.pop(acts))
        still = held()
        if still is not None:
            self._complements[acts] = still

    def _hold(self, adapter: Adapter) -> None:
        name = adapter.name
        self.adapters[name] = adapter
        self._singles[name] = ResolvedMix(Mix((name,)), (adapter,), (adapter.row,), None)
        if adapter.stamp is not None and name not in self.pinned:
            self.evictable.setdefault(name)

    def _all_held(self, count: int) -> str:
        """Why no more rows can be had, and what to do."""
        rows = self.rows - 1
        worn = set(self.evictable)
        kinds = {
            "worn by set_adapter, a route, a running forward, a result with gradients or a captured CUDA graph": worn,
            "pinned": self.pinned & set(self.adapters),
            "loaded or trained, and not registered": {
                name for name, adapter in self.adapters.items() if adapter.stamp is None and name not in self.pinned
            },
        }
        told = [f"{len(names)} {kind} ({some(sorted(names))})" for kind, names in kinds.items() if names]
        others = rows - len(self.adapters) - len(self._free) - len(self._complements)
        if self._complements:
            told.append(f"{len(self._complements)} of what weighted sums leave as it is")
        if others > 0:
            told.append(f"{others} of adapters that were deleted or whose files changed, and that are still worn")
        return (
            f"{count} more row{'s' if count > 1 else ''} of the bank wanted, {len(self._free)} can be had: of "
            f"its {rows}, {', '.join(told)}. End a route or set_adapter(None), unpin() or delete_adapter() some, or "
            "patch(capacity=…) with more"
        )

    def _await(self, rows: Iterable[int]) -> None:
        """Lets the current streams of CUDA devices wait for rows that are being copied."""
        for row in rows:
            events = self._arriving.get(row)
            for event in events or ():
                event.wait(torch.cuda.current_stream(event.device))
            if events and all(event.query() for event in events):  # type: ignore[no-untyped-call]
                self._arriving.pop(row, None)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """A context that takes back what was added in it, rows and columns too, if it ends with an exception."""
        tables, sites = self.tables, self.sites
        placed = self._placed = []  # a copy of all names would take longer the more there are
        try:
            yield
        except BaseException:
            for name in placed:
                adapter = self._forget(name)
                self._free.append(adapter.row)
                adapter.free = []  # whenever it dies, its row was freed here
            self.sites = sites
            self._place(tables)
            self._free[:] = [row for row in self._free if row < self.rows]
            raise
        finally:
            self._placed = None

    def remove(self, name: str) -> Adapter:
        """Deletes an adapter. Its row is free, and its numbers are overwritten, once nobody holds it."""
        adapter = self._forget(name)
        adapter.is_deleted = True
        self.pinned.discard(name)
        return adapter

    def retire(self, name: str) -> None:
        """Makes room for another adapter of this name, as its files changed; whoever wears the old one goes on."""
        self._forget(name)

    def restore(self, adapter: Adapter) -> None:
        """Makes an adapter resident again that was retired, and is held."""
        self._hold(adapter)

    def keep(self, name: str) -> None:
        """Lets a registered adapter be one of its own, that is no more what its files are."""
        self.adapters[name].stamp = None
        self.evictable.pop(name, None)

    def _forget(self, name: str) -> Adapter:
        self._singles.pop(name, None)
        self.evictable.pop(name, None)
        return self.adapters.pop(name)

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

    def moved(self, position: int, device: torch.device) -> bool:
        """Says that a site lies on a device now. Whether all lie there now, and are to be settled.

        So a model that moves module by module moves its table once. What moves in part is settled by the next forward.
        """
        if self._noted[position] == device:
            return False
        self._noted[position] = device
        self.is_settled = False
        return all(each == device for each in self._noted)

    @outside_inference_mode
    def settle(self) -> bool:
        """Brings each site's columns to where it lies. Whether any were elsewhere.

        Those of a site whose weights are away stay where they are, unless all are.
        """
        devices = self._devices(self.sites)
        if not all(each.type == "meta" for each in devices):
            known = (self.tables[at].device for at in self.places)
            devices = [at if each.type == "meta" else each for each, at in zip(devices, known, strict=True)]
        self.is_settled, self._noted = True, devices
        if all(self.tables[at].device == each for at, each in zip(self.places, devices, strict=True)):
            return False
        self._await([*self._arriving])
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

    def complements(self, sums: Iterable[Iterable[frozenset[Site]]]) -> tuple[list[Adapter], int]:
        """The rows of what weighted sums leave as it is: those that are there, and how many have to be made.

        Args:
            sums: of each sum, where each of its adapters acts.
        """
        wanted = set(map(_all_sites, sums))
        there = [self._complements[acts] for acts in wanted & self._complements.keys()]
        return there, len(wanted) - len(there)

    @outside_inference_mode
    def _complement(self, acts: frozenset[Site]) -> Adapter:
        """The row that is 0 at these sites and 1 elsewhere, also at sites that the bank gets later."""
        if acts not in self._complements:
            self.make_room(1)
            with self._writing() as row:
                for here in self.tables:
                    here.table[row].fill_(1.0)
                rows = self.by_site(lambda here: torch.split(here.table[row], here.widths))
                for site, columns in zip(self.sites.values(), rows, strict=True):
                    if site in acts:  # of a fused layer, in its slices only
                        columns[... if site.slices is None else site.slices.inside(columns.device)] = 0.0
            self._complements[acts] = Adapter("", row, frozenset(), free=self._free)
        return self._complements[acts]

    def _grow(self, sites: dict[SiteKey, Site]) -> None:
        """Doubles the rows where none is free, and adds the columns of the sites that it lacks."""
        self._await([*self._arriving])
        capacity, before = self.rows, {each.device: each for each in self.tables}
        rows = capacity if self._free else 2 * capacity
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
        self._free[:0] = range(rows - 1, capacity - 1, -1)

    def _place(self, tables: tuple[DeviceTable, ...]) -> None:
        self.tables = tables
        places = range(len(self.sites))
        self.places = [next((at for at, each in enumerate(tables) if each.widths[i]), 0) for i in places]
        self._noted = [tables[at].device for at in self.places]
        self.is_settled = True
        self.is_cuda = any(each.table.is_cuda for each in tables)
