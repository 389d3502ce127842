"""The numbers by which vLLM's engine tells adapters and mixes apart: two ranges, which cannot meet."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from vllm.utils.counter import AtomicCounter

FIRST_MIX = 1 << 30
END = 1 << 31
"""vLLM's workers keep numbers in 32 bits, with a sign."""
_lent: ContextVar[list[int] | None] = ContextVar("_lent", default=None)


class AdapterNumbers(AtomicCounter):
    """In the place of vLLM's counter: numbers from 1 on, below FIRST_MIX, of adapters that were looked for and found.

    vLLM takes a number before it looks for an adapter. What is not found gives it back, so that names that mean nothing
    count nothing up, however many are asked for.
    """

    def __init__(self) -> None:
        super().__init__(0)
        self._free: list[int] = []

    def inc(self, num: int = 1) -> int:
        """The next number, or one that was given back.

        Raises:
            OverflowError: there is none left.
        """
        with self._lock:
            if self._free:
                number = self._free.pop()
            elif self._value + num >= FIRST_MIX:
                raise OverflowError(f"{FIRST_MIX - 1} adapters were loaded: start the server anew")
            else:
                self._value += num
                number = self._value
        lent = _lent.get()
        if lent is not None:
            lent.append(number)
        return number

    def give_back(self, numbers: list[int]) -> None:
        """Takes back numbers of which the engine was never told."""
        with self._lock:
            self._free.extend(numbers)

    @contextmanager
    def lent(self) -> Iterator[list[int]]:
        """A context in which the numbers that this task takes are in the list."""
        taken: list[int] = []
        token = _lent.set(taken)
        try:
            yield taken
        finally:
            _lent.reset(token)


class MixNumbers:
    """Numbers of mixes, from FIRST_MIX on, and from there again when all were had.

    Args:
        rank: this API server's place among them, from 0 on.
        count: how many API servers there are; they number their mixes without knowing of each other.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self._first, self._step = FIRST_MIX + max(rank, 0), max(count, 1)
        self._next = self._first

    def take(self, used: Container[int]) -> int:
        """The next number that is not among `used`."""
        while True:
            number, self._next = self._next, self._next + self._step
            if self._next >= END:
                self._next = self._first
            if number not in used:
                return number
