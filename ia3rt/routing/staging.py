"""Host memory that tables are copied to the device from: switching waits for no device and makes nothing anew."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_TURNS = 16  # switches that may be on their way to the device at once; one more waits for the first


class Turn:
    """Numbers to be copied once.

    Attributes:
        ints: the numbers as int32; written by slices, which costs a twentieth of making a tensor.
        floats: the same memory as float32.
    """

    def __init__(self, memory: Tensor) -> None:
        count, address = len(memory), memory.data_ptr()
        self.ints = (ctypes.c_int32 * count).from_address(address)
        self.floats = (ctypes.c_float * count).from_address(address)
        self._memory = memory
        self._copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Returns when the last copy has been made."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, table: Tensor, count: int) -> None:
        """Copies the first `count` numbers into an int32 [≥ count] of the device, in its current stream."""
        table[:count].copy_(self._memory[:count], non_blocking=True)
        if table.is_cuda:
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(table.device))


class Staging:
    """Room for the int32 or float32 numbers of a table, several times over: a copy may still read the last ones.

    Args:
        count: how many numbers.
        device: where the table is.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._made = count, device
        turns = _TURNS if device.type == "cuda" else 1  # a copy within the CPU is made when the call returns
        memory = torch.zeros(turns, count, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._turns = [Turn(row) for row in memory]
        self._next = 0

    def __deepcopy__(self, memo: object) -> Staging:
        """Other memory: what is on its way from this one is not the copy's."""
        return Staging(*self._made)

    def turn(self) -> Turn:
        """Numbers to write now, whatever is on its way to the device."""
        turn = self._turns[self._next]
        self._next = (self._next + 1) % len(self._turns)
        turn.wait()
        return turn
