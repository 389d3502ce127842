"""A lock for each name that somebody holds or waits for, and for no other."""

from __future__ import annotations

from asyncio import Lock
from weakref import WeakValueDictionary


class NameLocks:
    """In the place of vLLM's dictionary of locks, which keeps one for every name that was ever asked for."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, Lock] = WeakValueDictionary()

    def __getitem__(self, name: str) -> Lock:
        """The lock of a name; whoever uses it keeps it alive."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = Lock()
        return lock

    def __len__(self) -> int:
        """How many names have one."""
        return len(self._locks)
