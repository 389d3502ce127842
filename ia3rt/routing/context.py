"""What a thread, or a task of an event loop, wears, and which forward it is in."""

from __future__ import annotations

import threading
from contextvars import ContextVar

from ia3rt.routing.forward import Forward
from ia3rt.routing.wearing import Wearing
from ia3rt.routing.worn import Memory


class Captured:
    """The memory that CUDA graphs read which were captured in one context.

    Attributes:
        wearing: what the context wears.
        memories: by the rows of the batch; a switch of the context writes them too.
    """

    def __init__(self, wearing: Wearing) -> None:
        self.wearing = wearing
        self.memories: dict[int | None, Memory] = {}


class _Local(threading.local):
    """What compiled code finds what is worn by: a compiler does not look into a ContextVar."""

    def __init__(self, wearing: Wearing) -> None:
        self.wearing = wearing


class Context:
    """Of one model. A context has what it entered itself, and else what is worn everywhere.

    Attributes:
        everywhere: what contexts wear that have nothing of their own.
        local: the same for compiled code: `local.wearing` is what its thread wears.
    """

    def __init__(self, everywhere: Wearing) -> None:
        self.everywhere = everywhere
        self.local = _Local(everywhere)
        self._wearing: ContextVar[Wearing] = ContextVar("ia3_wearing", default=everywhere)
        self._forward: ContextVar[Forward | None] = ContextVar("ia3_forward", default=None)
        self._captured: ContextVar[Captured | None] = ContextVar("ia3_captured", default=None)
        self._all_captured: list[Captured] = []
        self.forward = self._forward.get  # looked up once: layers ask it at each call

    @property
    def wearing(self) -> Wearing:
        """What this context wears."""
        return self._wearing.get()

    def wear(self, wearing: Wearing) -> None:
        """Makes it what this context wears."""
        self._wearing.set(wearing)
        self.local.wearing = wearing
        captured = self._captured.get()
        if captured is not None:
            captured.wearing = wearing
            self.rewrite(wearing)

    def capture(self, rows: int | None, memory: Memory) -> None:
        """Keeps memory that a CUDA graph reads, as this context's, for a batch of so many rows."""
        captured = self._captured.get()
        if captured is None:
            captured = Captured(self.wearing)
            self._captured.set(captured)
            self._all_captured.append(captured)
        captured.memories[rows] = memory

    def rewrite(self, wearing: Wearing) -> None:
        """Writes what is worn into the memory that CUDA graphs read, in each context that wears it."""
        for captured in self._all_captured:
            if captured.wearing is wearing:
                for rows, memory in captured.memories.items():
                    wearing.worn.write_to(memory, rows)

    def enter(self, forward: Forward | None) -> None:
        """Makes it the forward that this context is in."""
        self._forward.set(forward)
        self.local.wearing = self.wearing if forward is None else forward.wearing

    def __deepcopy__(self, memo: object) -> None:
        """Nothing: a copied model is in no forward, and its routing makes a context of its own."""
