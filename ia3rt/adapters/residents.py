"""Who has the rows of a bank: the resident adapters by name, and which of them make room for others."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.resolved import ResolvedMix
from ia3rt.adapters.shortened import some
from ia3rt.adapters.site import Site


class NoRowError(ValueError):
    """The bank does not grow, and every row of it is pinned, worn or an adapter's that was not registered."""


class Residents(dict[str, Adapter]):
    """The resident adapters by name. They come and go by the methods below.

    Args:
        free: the bank's free rows.

    Attributes:
        evictable: the names of those that may make room, the one used least recently first.
        pinned: the names of those that may not, as `pin` said, whether they might before or not.
        evictions: how many made room so far.
        singles: by name, each alone as a mix: nearly all that is worn is one of these.
        complements: the rows of what weighted sums leave as it is, by where their adapters act.
    """

    def __init__(self, free: list[int]) -> None:
        super().__init__()
        self.evictable: OrderedDict[str, None] = OrderedDict()
        self.pinned: set[str] = set()
        self.evictions = 0
        self.singles: dict[str, ResolvedMix] = {}
        self.complements: dict[frozenset[Site], Adapter] = {}
        self._free = free

    def find(self, name: str) -> Adapter:
        """A resident adapter.

        Raises:
            ValueError: none of this name is resident.
        """
        if name not in self:
            raise ValueError(f"unknown adapter {name!r}: load it first (loaded: {some(self)})")
        return self[name]

    def check_name(self, name: str) -> None:
        """Raises ValueError where no new adapter can have this name."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"an adapter's name must be a string that is not empty, got {name!r}")
        if name in self:
            raise ValueError(
                f"an adapter named {name!r} is already loaded: delete_adapter it first, or use another name"
            )

    def hold(self, adapter: Adapter) -> None:
        """Makes an adapter resident that has its row; also one that was so before, and is still held."""
        name = adapter.name
        self[name] = adapter
        self.singles[name] = ResolvedMix(Mix((name,)), (adapter,), (adapter.row,), None)
        if adapter.stamp is not None and name not in self.pinned:
            self.evictable.setdefault(name)

    def forget(self, name: str) -> Adapter:
        """Lets another adapter have this name. Whoever wears the old one goes on; its row is free once nobody does."""
        self.singles.pop(name, None)
        self.evictable.pop(name, None)
        return self.pop(name)

    def remove(self, name: str) -> Adapter:
        """Deletes an adapter. Its row is free, and its numbers are overwritten, once nobody holds it."""
        adapter = self.forget(name)
        adapter.is_deleted = True
        self.pinned.discard(name)
        return adapter

    def keep(self, name: str) -> None:
        """Lets a registered adapter be one of its own, that is no more what its files are."""
        self[name].stamp = None
        self.evictable.pop(name, None)

    def complements_for(self, sums: Iterable[Iterable[frozenset[Site]]]) -> tuple[list[Adapter], int]:
        """The rows of what weighted sums leave as it is: those that are there, and how many have to be made.

        Args:
            sums: of each sum, where each of its adapters acts.
        """
        wanted = {frozenset().union(*each) for each in sums}
        there = [self.complements[acts] for acts in wanted & self.complements.keys()]
        return there, len(wanted) - len(there)

    def make_room(self, count: int, capacity: int, release: Callable[[], object]) -> None:
        """Sees that so many rows are free, by letting go of registered adapters that nobody wears.

        Args:
            count: how many are wanted.
            capacity: how many rows there are, without the identity's.
            release: lets go of what is held in case it is wanted again; called before a row is refused.

        Raises:
            NoRowError: that is not enough. Everything is as it was then.
        """
        gone: list[dict[str, Any]] = []
        for look_further in (_nothing, release, _collect, _collect_all):
            look_further()
            for acts in list(self.complements):
                if len(self._free) < count:
                    self._let_go_complement(acts)
            for _ in range(len(self.evictable)):
                if len(self._free) < count:
                    self._let_go(next(iter(self.evictable)), gone)
            if len(self._free) >= count:
                self.evictions += len(gone)
                return
        refused = self._all_held(count, capacity)
        for own in reversed(gone):
            self._free.remove(own["row"])
            self.hold(Adapter(**own))
            self.evictable.move_to_end(own["name"], last=False)
        raise NoRowError(refused)

    def _let_go(self, name: str, gone: list[dict[str, Any]]) -> None:
        """Evicts an adapter, or moves it to the end where somebody holds it, which is a use of it."""
        adapter = self.pop(name)
        del self.singles[name]
        own = {each.name: getattr(adapter, each.name) for each in fields(adapter) if each.init}
        held = weakref.ref(adapter)
        del adapter
        still = held()
        if still is None:
            del self.evictable[name]
            gone.append(own)
            return
        self.hold(still)
        self.evictable.move_to_end(name)

    def _let_go_complement(self, acts: frozenset[Site]) -> None:
        held = weakref.ref(self.complements.pop(acts))
        still = held()
        if still is not None:
            self.complements[acts] = still

    def _all_held(self, count: int, capacity: int) -> str:
        """Why no more rows can be had, and what to do."""
        worn = set(self.evictable)
        kinds = {
            "worn by set_adapter, a route, a running forward, a result with gradients or a captured CUDA graph": worn,
            "pinned": self.pinned & set(self),
            "loaded or trained, and not registered": {
                name for name, adapter in self.items() if adapter.stamp is None and name not in self.pinned
            },
        }
        told = [f"{len(names)} {kind} ({some(sorted(names))})" for kind, names in kinds.items() if names]
        others = capacity - len(self) - len(self._free) - len(self.complements)
        if self.complements:
            told.append(f"{len(self.complements)} of what weighted sums leave as it is")
        if others > 0:
            told.append(f"{others} of adapters that were deleted or whose files changed, and that are still worn")
        return (
            f"{count} more row{'s' if count > 1 else ''} of the bank wanted, {len(self._free)} can be had: of its "
            f"{capacity}, {', '.join(told)}. End a route or set_adapter(None), unpin() or delete_adapter() some, or "
            "patch(capacity=…) with more"
        )


def _nothing() -> None:
    """Nothing."""


def _collect() -> None:
    """Finds what only garbage in cycles holds, of lately: all of it takes as long as hundreds of switches."""
    gc.collect(1)


def _collect_all() -> None:
    """The same of all that there is, as a last resort: what an error in compiled code held may have grown old."""
    gc.collect()
