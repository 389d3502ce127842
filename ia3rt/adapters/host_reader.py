"""Registered adapters as rows in the host's memory: kept there, or read from their files."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from threading import RLock

from ia3rt.adapters.adapter import Stamp
from ia3rt.adapters.host import HostRow, HostTier


class HostReader:
    """Reads an adapter once for all who want it at the same time. Called without the lock, as the disk may be slow.

    Args:
        read: (name, folder, whether it was registered by name) reads an adapter's files as a row of the bank.
        lock: the bank's.
        limit: what rows in the host's memory may take together, in bytes.

    Attributes:
        kept: what is in the host's memory.
        read_seconds: the time in which files were read, all together.
    """

    def __init__(self, read: Callable[[str, Path, bool], HostRow], lock: RLock, limit: int) -> None:
        self.read = read
        self.kept = HostTier(limit)
        self.read_seconds = 0.0
        self._lock = lock
        self._reading: dict[tuple[str, Path, Stamp], Future[HostRow]] = {}

    def load(self, name: str, folder: Path, stamp: Stamp, is_registered: bool) -> HostRow:
        """Reads an adapter, or waits for the thread that does already, since it saw the same files."""
        key, mine = (name, folder, stamp), Future[HostRow]()
        while (reading := self._begin_reading(key, mine)) is not mine:
            with suppress(CancelledError):
                return reading.result()
        begun = time.perf_counter()
        try:
            row = self.read(name, folder, is_registered)
            self.kept.put(name, row)
            mine.set_result(row)
            return row
        except Exception as error:
            mine.set_exception(error)
            raise
        finally:
            mine.cancel()  # where Ctrl-C ended it, which is not for those who wait
            with self._lock:
                self._reading.pop(key)
                self.read_seconds += time.perf_counter() - begun

    def _begin_reading(self, key: tuple[str, Path, Stamp], mine: Future[HostRow]) -> Future[HostRow]:
        """Who reads a file: `mine`, unless another does."""
        with self._lock:
            return self._reading.setdefault(key, mine)
