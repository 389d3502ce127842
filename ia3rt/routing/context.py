"""What a thread, or a task of an event loop, wears, and which forward it is in."""

from __future__ import annotations

import threading
from contextvars import ContextVar, Token
from types import ModuleType
from typing import TypeVar

from ia3rt.routing.forward import Forward
from ia3rt.routing.traced import leave_alone
from ia3rt.routing.wearing import Wearing
from ia3rt.routing.worn import Memory, Worn

T = TypeVar("T")


class Captured:
    """The memory that CUDA graphs read which were captured in one context.

    Attributes:
        wearing: what the context wears.
        memories: each with the rows of the batch that it is for; a switch of the context writes them too.
    """

    def __init__(self, wearing: Wearing) -> None:
        self.wearing = wearing
        self.memories: list[tuple[int | None, Memory]] = []


class Held:
    """What the compiled forward wears that a thread is in: nobody writes into its memory as long as it is here.

    Attributes:
        worn: None outside of one. It may be left here by one that ended with an error.
    """

    worn: Worn | None = None


class _Local(threading.local):
    def __init__(self) -> None:
        self.held = Held()


class Now(ModuleType):
    """What compiled code finds what is worn by.

    A compiler does not look into a ContextVar, and a thread's local is not what a thread wears that runs one context
    after another: a pool's, or an event loop's. An attribute of a module is read anew by each call of compiled code,
    and what gives it is not looked into. So this is one.
    """

    def __init__(self, wearing: ContextVar[Wearing], forward: ContextVar[Forward | None]) -> None:
        super().__init__("ia3rt_now")
        self._wearing, self._forward = wearing, forward

    def _find(self) -> Wearing:
        """What the forward wears that this context is in, or else what the context wears."""
        forward = self._forward.get()
        return self._wearing.get() if forward is None else forward.wearing

    wearing = property(_find)
    leave_alone(_find.__code__)


def _unset(variable: ContextVar[T], token: Token[T] | None, value: T) -> None:
    """Makes a variable what it was before: unset where it was that, as a context keeps what is set in it."""
    try:
        if token is not None:
            variable.reset(token)
    except (ValueError, RuntimeError):  # set in a context that this one is a copy of
        variable.set(value)


class Context:
    """Of one model. A context has what it entered itself, and else what is worn everywhere.

    Attributes:
        everywhere: what contexts wear that have nothing of their own.
        now: the same for compiled code.
        local: `local.held` is what the compiled forward wears that a thread is in.
    """

    def __init__(self, everywhere: Wearing) -> None:
        self.everywhere = everywhere
        self.local = _Local()
        self._wearing: ContextVar[Wearing] = ContextVar("ia3_wearing", default=everywhere)
        self._forward: ContextVar[Forward | None] = ContextVar("ia3_forward", default=None)
        self._suspended: ContextVar[tuple[Forward, ...]] = ContextVar("ia3_suspended", default=())
        self._captured: ContextVar[Captured | None] = ContextVar("ia3_captured", default=None)
        self._all_captured: list[Captured] = []
        self.now = Now(self._wearing, self._forward)
        self.forward = self._forward.get  # looked up once: layers ask it at each call

    @property
    def wearing(self) -> Wearing:
        """What this context wears."""
        return self._wearing.get()

    def wear(self, wearing: Wearing) -> None:
        """Makes it what this context wears."""
        before = self.wearing
        if wearing is self.everywhere:
            _unset(self._wearing, before.token, wearing)
        else:
            token = self._wearing.set(wearing)
            wearing.token = before.token or token  # of the first: what takes it back leaves nothing of the model
        self.local.held.worn = None
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
        if all(memory is not known for _, known in captured.memories):
            captured.memories.append((rows, memory))

    def captured(self, rows: int | None) -> Memory | None:
        """Memory for a batch of so many rows that CUDA graphs of this context read, and that it has written last."""
        captured = self._captured.get()
        return next((memory for of, memory in captured.memories if of == rows), None) if captured else None

    def forget_captured(self) -> bool:
        """Leaves memory that CUDA graphs read as it is from now on; says whether there was any."""
        were_captured = any(captured.memories for captured in self._all_captured)
        for captured in self._all_captured:
            captured.memories.clear()
        return were_captured

    def rewrite(self, wearing: Wearing) -> None:
        """Writes what is worn into the memory that CUDA graphs read, in each context that wears it."""
        for captured in self._all_captured:
            if captured.wearing is wearing:
                for rows, memory in captured.memories:
                    wearing.worn.write_to(memory, rows)

    def enter(self, forward: Forward) -> None:
        """Makes it the forward that this context is in."""
        forward.token = self._forward.set(forward)
        self.local.held.worn = None

    def leave(self, forward: Forward) -> None:
        """Ends what `enter` began."""
        _unset(self._forward, forward.token, forward.outer)

    @property
    def suspended(self) -> tuple[Forward, ...]:
        """The forwards that this context was taken out of, the outermost first."""
        return self._suspended.get()

    def suspend(self) -> Forward | None:
        """Takes this context out of its forward, so that what is called within begins one of its own; gives it."""
        forward = self.forward()
        if forward is not None:
            self._forward.set(None)
            self._suspended.set((*self.suspended, forward))
        return forward

    def resume(self, forward: Forward) -> bool:
        """Ends what `suspend` began. Whether the forward goes on: it may have ended, as a generator holds a `with`."""
        if forward not in self.suspended:
            return False
        self.forget(forward)
        self._forward.set(forward)
        self.local.held.worn = None
        return True

    def forget(self, forward: Forward) -> None:
        """Says that a suspended forward is so no more."""
        self._suspended.set(tuple(each for each in self.suspended if each is not forward))

    def __deepcopy__(self, memo: object) -> None:
        """Nothing: a copied model is in no forward, and its routing makes a context of its own."""
