"""Registered adapters: known by name, and brought into the bank from the host's memory or the disk when one is wanted.

Three tiers: the bank's rows on the device, rows in the host's memory, files. `fetch` reads what has to be read, without
the lock, so that others go on meanwhile; `resolve` copies it into the bank, with the lock. Nothing that `fetch` gave is
evicted as long as somebody holds it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.fetched import Fetched
from ia3rt.adapters.host import HostRow
from ia3rt.adapters.host_reader import HostReader
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.registry import AdapterSource, Registry, gone, stamp_of
from ia3rt.adapters.residents import NoRowError
from ia3rt.adapters.resolved import ResolvedMix, leaves_a_rest
from ia3rt.adapters.shortened import some
from ia3rt.adapters.site import Site
from ia3rt.adapters.tier_stats import TierStats
from ia3rt.adapters.together import check_modules

Check: TypeAlias = Callable[[Sequence[tuple[Adapter, ...]]], None]
_FRESH = 1.0
"""Seconds in which the files of a resident adapter are not looked at again: a look takes longer than a switch."""


class Tiers:
    """The registered adapters of one bank.

    Args:
        bank: where they are worn.
        read: (name, folder, whether it was registered by name) reads an adapter's files as a row of the bank.
        grown: what to do when the bank's table has become another one.
        host_bytes: what rows in the host's memory may take together.

    Attributes:
        is_empty: whether nothing was registered yet.
    """

    def __init__(
        self, bank: Bank, read: Callable[[str, Path, bool], HostRow], grown: Callable[[], None], host_bytes: int
    ) -> None:
        self._bank = bank
        self._reader = HostReader(read, bank.lock, host_bytes)
        self._grown = grown
        self._registry = Registry()
        self._looked: dict[str, float] = {}  # when the files of a resident adapter were last seen to be what it is
        self._hits = self._host_loads = self._disk_loads = self._changed = 0
        self._load_seconds = 0.0
        self.is_empty = True
        self._pool: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def names(self) -> list[str]:
        """The names that were registered, without those that functions know."""
        return list(self._registry.folders)

    def register(self, source: AdapterSource, found: dict[str, Path]) -> list[str]:
        """Makes names known; all of a source or none. Called with the lock.

        Args:
            source: what knows them.
            found: what `Registry.read` found in it, without the lock.

        Raises:
            ValueError: a name is another folder's, or a loaded adapter's.
        """
        self._registry.check(found)
        for name in found:
            if name in self._bank.adapters and name not in self._registry.folders:
                raise ValueError(f"an adapter named {name!r} is loaded already: delete_adapter it first")
        self.is_empty = False
        self._registry.folders.update(found)
        if callable(source):
            self._registry.finders.append(source)
        return list(found)

    def knows(self, name: str) -> bool:
        """Whether a name is an adapter's: a resident or a registered one."""
        return name in self._bank.adapters or self._registry.knows(name)

    def is_registered(self, name: str) -> bool:
        """Whether a name was registered, by no function."""
        return name in self._registry.folders

    def forget(self, name: str) -> None:
        """Makes a name unknown again, but for a function that knows it."""
        self._registry.folders.pop(name, None)
        self._reader.kept.drop(name)
        self._looked.pop(name, None)

    def fetch(self, names: Iterable[str], counts: bool = True) -> Fetched:
        """What these adapters are, read from their files where they are in no memory.

        Called without the lock, or others wait for the disk.

        Args:
            names: adapters'.
            counts: whether they are wanted now, for the statistics.

        Raises:
            ValueError: one is unknown, or its files are damaged or not for this model. Nothing has changed then.
            FileNotFoundError: its files are gone.
            NoRowError: they are more than the bank has rows.
        """
        bank, fetched, stale = self._bank, Fetched(), []
        wanted = dict.fromkeys(names)
        with bank.lock:
            if len(wanted) > 1:
                self._check_capacity(len(wanted))
            for name in wanted:
                adapter = bank.adapters.get(name)
                if adapter is None:
                    stale.append(name)
                    continue
                fetched.adapters[name] = adapter
                if adapter.stamp is not None:
                    self._hits += counts
                    if name in bank.adapters.evictable and time.monotonic() - self._looked.get(name, 0.0) > _FRESH:
                        stale.append(name)
        for name in stale:
            folder = self._registry.find(name)
            if folder is None:
                raise self._unknown(name)
            looked = time.monotonic()
            stamp = self._stamp(name, folder)
            resident = fetched.adapters.get(name)
            if resident is not None and resident.stamp in (stamp, None):
                with bank.lock:
                    if bank.adapters.get(name) is resident:
                        self._looked[name] = looked
                continue
            fetched.adapters.pop(name, None)  # the one of now takes its place
            row = self._reader.kept.get(name)
            is_known = row is not None and (row.stamp, row.folder) == (stamp, folder)
            with bank.lock:
                self._changed += resident is not None or (row is not None and not is_known)
                self._host_loads += counts and is_known
                self._disk_loads += not is_known
            if row is None or not is_known:
                row = self._reader.load(name, folder, stamp, self.is_registered(name))
            fetched.rows[name] = row
            fetched.looked[name] = looked
        return fetched

    def resolve(self, mixes: Sequence[Mix], fetched: Fetched, check: Check | None = None) -> list[ResolvedMix]:
        """Looks the adapters of mixes up, of which `fetched` are registered; called with the lock.

        Args:
            mixes: what is to be worn.
            fetched: what their adapters are that are registered.
            check: refuses adapters, given those of each mix, before any is brought in and others make room for it.

        Raises:
            NoRowError: there is no room for all of them. Nothing was evicted for them then.
            ValueError: one was deleted meanwhile; or as `Bank.resolve`, and as `check`.
        """
        for name, adapter in fetched.adapters.items():
            known = name in self._registry.folders or self._registry.finders
            if name not in self._bank.adapters and known and not adapter.is_deleted:
                self._bank.adapters.hold(adapter)  # it was forgotten, and the newer one is evicted already
                self._looked.pop(name, None)
        sums = self._sums(mixes, fetched)
        rests, missing = self._bank.adapters.complements_for(sums) if sums else ([], 0)
        if sums:
            self._check_capacity(len(fetched.adapters) + len(fetched.rows), len(rests) + missing)
        if not fetched.rows and not missing:
            resolved = [self._bank.resolve(mix) for mix in mixes]
            if check is not None:
                check([mix.adapters for mix in resolved])
            return resolved
        absent = self._absent(fetched)
        planned = self._planned(mixes, absent)
        for adapters in planned:
            check_modules(adapters)
        if check is not None:
            check(planned)
        held = self._bring(fetched, absent, missing)
        resolved = [self._bank.resolve(mix) for mix in mixes]
        del held, rests  # what one mix needs was not evicted for another one
        return resolved

    def pin(self, name: str, fetched: Fetched) -> None:
        """Makes an adapter resident and lets it stay, as it is now; called with the lock. Raises as `resolve`."""
        self.resolve((Mix((name,)),), fetched)
        self._bank.adapters.pinned.add(name)
        self._bank.adapters.evictable.pop(name, None)

    def unpin(self, name: str) -> None:
        """Lets an adapter make room again; called with the lock.

        Raises:
            ValueError: it was not pinned.
        """
        if name not in self._bank.adapters.pinned:
            raise ValueError(f"adapter {name!r} is not pinned")
        self._bank.adapters.pinned.discard(name)
        if self._bank.adapters[name].stamp is not None:
            self._bank.adapters.evictable[name] = None

    def prefetch(self, names: list[str]) -> Future[None]:
        """Brings adapters in by a thread of its own; on CUDA they are copied in a stream of its own.

        Where there is no room for one it stays in the host's memory. What fails is told by the future.

        Raises:
            ValueError: one is unknown.
        """
        for name in names:
            if not self.knows(name):
                raise self._unknown(name)
        with self._bank.lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="ia3rt-prefetch")
        return self._pool.submit(self._prefetch, names)

    def stats(self) -> TierStats:
        """What became of the registered adapters; called with the lock."""
        bank = self._bank
        return TierStats(
            registered=len(self._registry.folders),
            resident=len(bank.adapters),
            pinned=len(bank.adapters.pinned),
            rows=bank.rows - 1,
            hits=self._hits,
            misses=self._host_loads + self._disk_loads,
            host_loads=self._host_loads,
            disk_loads=self._disk_loads,
            evictions=bank.adapters.evictions,
            host_evictions=self._reader.kept.evictions,
            changed=self._changed,
            device_bytes=bank.nbytes,
            host_bytes=self._reader.kept.nbytes,
            load_seconds=self._load_seconds,
            read_seconds=self._reader.read_seconds,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tiers:
        """The same names for a copy of the bank, and nothing in the host's memory."""
        read, grown = copy.deepcopy(self._reader.read, memo), copy.deepcopy(self._grown, memo)
        made = memo[id(self)] = Tiers(copy.deepcopy(self._bank, memo), read, grown, self._reader.kept.limit)
        made.is_empty = self.is_empty
        made._registry.folders.update(self._registry.folders)
        made._registry.finders.extend(self._registry.finders)
        return made

    def _check_capacity(self, adapters: int, rests: int = 0) -> None:
        """Raises NoRowError where so many rows cannot be had at once, whatever is evicted.

        Args:
            adapters: how many are worn.
            rests: how many rows weighted sums need besides, for what they leave as it is.
        """
        capacity, wanted = self._bank.rows - 1, adapters + rests
        if wanted > capacity and not self._bank.grows:
            sums = f", and {rests} more rows for what weighted sums leave as it is" if rests else ""
            raise NoRowError(
                f"{adapters} adapters are worn at once{sums}, and the bank has {capacity} rows and does not grow: "
                f"patch(capacity=…) with at least {wanted}, or wear fewer in one batch"
            )

    def _sums(self, mixes: Iterable[Mix], fetched: Fetched) -> list[list[frozenset[Site]]]:
        """Of each weighted sum that needs a row for the rest, where each of its adapters acts."""
        found = []
        for mix in mixes:
            if leaves_a_rest(mix):
                rows = (fetched.rows.get(name) or self._bank.adapters.get(name) for name in mix.adapters)
                found.append([row.sites for row in rows if row is not None])
        return found

    def _absent(self, fetched: Fetched) -> dict[str, HostRow]:
        """The rows that were fetched and are to be brought in; called with the lock.

        Raises:
            ValueError: one was deleted meanwhile.
        """
        return {name: row for name, row in fetched.rows.items() if self._is_absent(name, row, fetched.looked[name])}

    def _planned(self, mixes: Iterable[Mix], absent: Mapping[str, HostRow]) -> list[tuple[Adapter, ...]]:
        """The adapters of each mix; of those that would have to be brought in, what they would be."""
        would_be, resident = {name: _adapter(name, row) for name, row in absent.items()}, self._bank.adapters.find
        return [tuple([would_be.get(name) or resident(name) for name in mix.adapters]) for mix in mixes]

    def _is_absent(self, name: str, row: HostRow, looked: float) -> bool:
        """Whether a row is to be brought in that was read after a look at its files."""
        known = self._registry.folders.get(name)
        if known != row.folder and (known is not None or not self._registry.finders):
            raise ValueError(f"unknown adapter {name!r}: it was deleted meanwhile")
        resident = self._bank.adapters.get(name)
        if resident is None:
            return True
        if resident.stamp in (row.stamp, None) or name in self._bank.adapters.pinned:
            return False
        return self._looked.get(name, 0.0) <= looked  # else another thread brought in what is newer

    def _bring(self, fetched: Fetched, absent: Mapping[str, HostRow], more: int = 0) -> list[Adapter]:
        """Makes rows that were fetched resident, and gives their adapters, so that they are held; called with the lock.

        Args:
            fetched: whose rows.
            absent: those of them that `_absent` gave.
            more: how many rows are wanted besides.

        Raises:
            NoRowError: there is no room for all of them. Nothing was evicted for them then.
        """
        bank = self._bank
        held = [bank.adapters[name] for name in fetched.rows if name not in absent]
        begun, tables = time.perf_counter(), bank.tables
        for name in absent:
            if name in bank.adapters.evictable:  # its files are others now, so it goes first
                bank.adapters.evictable.move_to_end(name, last=False)
        bank.make_room(len(absent) + more)
        for name, row in absent.items():
            if name in bank.adapters:
                bank.adapters.forget(name)
            held.append(bank.place(_adapter(name, row), row.row))
            self._looked[name] = fetched.looked[name]
        if bank.tables is not tables:
            self._grown()
        self._load_seconds += time.perf_counter() - begun
        return held

    def _unknown(self, name: str) -> ValueError:
        loaded, registered = some(self._bank.adapters), some(self._registry.folders)
        return ValueError(
            f"unknown adapter {name!r}: load or register it first (loaded: {loaded}; registered: {registered})"
        )

    def _stamp(self, name: str, folder: Path) -> Any:
        try:
            return stamp_of(folder)
        except FileNotFoundError as error:
            raise gone(name, error, self.is_registered(name)) from None

    def _prefetch(self, names: list[str]) -> None:
        bank = self._bank
        for name in names:
            fetched = self.fetch([name], counts=False)
            with bank.lock, suppress(NoRowError), self._beside():
                self._bring(fetched, self._absent(fetched))

    def _beside(self) -> ExitStack:
        """A context in a stream of its own on each CUDA device."""
        context = ExitStack()
        for device in (table.device for table in self._bank.tables if table.table.is_cuda):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            context.enter_context(torch.cuda.stream(self._streams[device]))
        return context


def _adapter(name: str, row: HostRow) -> Adapter:
    """What a row that was read is in the bank, once it is placed there."""
    return Adapter(name, 0, row.sites, row.config, shared=row.shared, stamp=row.stamp)
