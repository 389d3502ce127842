"""Host memory that tables are copied to the device from: switching waits for no device and makes nothing anew."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_TURNS = 16  # switches that may be on their way to the device at once; one more waits for the first


class Turn:
    """Numbers to be copied once.

    Args:
        memory: where they are.
        table: the int32 table of the device that they are for; None where they are not copied.

    Attributes:
        ints: the numbers as int32; written here, which costs a twentieth of making a tensor.
        floats: the same memory as float32.
    """

    def __init__(self, memory: Tensor, table: Tensor | None = None) -> None:
        count, address = len(memory), memory.data_ptr()
        self.ints = (ctypes.c_int32 * count).from_address(address)
        self.floats = (ctypes.c_float * count).from_address(address)
        self._memory, self._table = memory, table
        self._first: dict[int, tuple[Tensor, Tensor]] = {}  # views of so many numbers of both
        self._copied = torch.cuda.Event() if table is not None and table.is_cuda else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Returns when the last copy has been made."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy(self, count: int, stream: torch.cuda.Stream | None) -> None:
        """Copies the first `count` numbers into the table, in the current stream of its device, which `stream` is."""
        assert self._table is not None
        views = self._first.get(count)
        if views is None:
            views = self._first[count] = self._table[:count], self._memory[:count]
        views[0].copy_(views[1], non_blocking=True)
        if self._copied is not None:
            self._copied.record(stream)


class Staging:
    """Room for the numbers of a table, several times over: a copy may still read the last ones.

    Args:
        table: int32 [numbers], of any device.
    """

    def __init__(self, table: Tensor) -> None:
        turns = _TURNS if table.is_cuda else 1  # a copy within the CPU is made when the call returns
        memory = torch.zeros(turns, len(table), dtype=torch.int32, device="cpu", pin_memory=table.is_cuda)
        self._turns = [Turn(row, table) for row in memory]
        self._next = 0

    def turn(self) -> Turn:
        """Numbers to write now, whatever is on its way to the device."""
        turn = self._turns[self._next]
        self._next = (self._next + 1) % len(self._turns)
        turn.wait()
        return turn
