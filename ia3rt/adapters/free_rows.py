"""The rows of a bank that nobody holds, and the writing of them: who reads one waits until it is written."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ia3rt.adapters.device_table import DeviceTable


class FreeRows:
    """The free rows of tables that have the same rows on each device; row 0, the identity's, never is one.

    Args:
        count: how many rows there are, the identity's included.

    Attributes:
        rows: those that are free, the one to be used next last. An adapter's comes back when nothing holds it any more.
        arriving: by row, the copies on CUDA devices that may not be done yet.
    """

    def __init__(self, count: int) -> None:
        self.rows = list(range(count - 1, 0, -1))
        self.arriving: dict[int, list[torch.cuda.Event]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FreeRows:
        """The same rows, all of which are written then, so that the tables can be copied; events are no part of it."""
        for event in (each for events in self.arriving.values() for each in events):
            event.synchronize()
        made = memo[id(self)] = FreeRows(0)
        made.rows = copy.deepcopy(self.rows, memo)
        return made

    @contextmanager
    def writing(self, tables: Sequence[DeviceTable]) -> Iterator[int]:
        """A context in which a free row is written, which is free again if that fails.

        On a CUDA device the current stream waits for those that may still read what was in it, and who asks by
        `wait_for` waits for what is written.
        """
        index = self.rows.pop()
        try:
            for table in tables:
                table.wait_for_readers()
            self.wait_for((index,))
            yield index
            arriving = [event for table in tables if (event := table.written()) is not None]
            if arriving:
                self.arriving[index] = arriving
        except BaseException:
            self.rows.append(index)
            raise

    def wait_for(self, rows: Iterable[int]) -> None:
        """Lets the current streams of CUDA devices wait for rows that are being copied."""
        for row in rows:
            events = self.arriving.get(row)
            for event in events or ():
                event.wait(torch.cuda.current_stream(event.device))
            if events and all(event.query() for event in events):  # type: ignore[no-untyped-call]
                self.arriving.pop(row, None)
