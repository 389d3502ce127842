"""Which forward a backward pass computes again: what its layers wear was decided when it began.

Gradient checkpointing throws away what a block computed, and runs the block again when its gradient is wanted, outside
of any forward and whatever is worn then. Autograd numbers what it records, thread by thread, in the order of recording.
So the number of what is being differentiated says in which forward of its thread it was recorded.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from ia3rt.routing.worn import Worn

_next_number = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
_HELD = 16  # what was worn is known as long as the result is, or as the last of these are
_WRAPPED = "ia3_worn"  # of a function of autograd's that has run whole forwards: what each model wore in its own


@dataclass
class _Stretch:
    """What was worn while autograd gave out these numbers."""

    begin: int
    end: float
    worn: weakref.ref[Worn]


@dataclass(eq=False)
class _Thread:
    """What a thread recorded. It has this as long as it runs, and its results have it; its id is given to another."""

    stretches: list[_Stretch] = field(default_factory=list)
    held: deque[Worn] = field(default_factory=lambda: deque(maxlen=_HELD))


class PastForwards:
    """What was worn while autograd recorded what it holds now."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._threads: list[weakref.ref[_Thread]] = []
        self._lock = threading.Lock()  # of this list

    def begin(self, worn: Worn) -> None:
        """Says that what this thread records from here on, until `end`, is computed with `worn`."""
        if not torch.is_grad_enabled():
            self._begin_unrecorded(worn)
            return
        here = self._here()
        stretches = here.stretches
        if stretches and stretches[-1].worn() is worn:
            stretches[-1].end = float("inf")  # what was recorded in between is no part of a model
            return
        begin = _next_number()
        if stretches:
            stretches[-1].end = min(stretches[-1].end, begin)
        stretches[:] = [stretch for stretch in stretches if stretch.worn() is not None]
        stretches.append(_Stretch(begin, float("inf"), weakref.ref(worn)))
        here.held.append(worn)

    def forget(self) -> None:
        """Lets go of what was worn in forwards whose results are gone."""
        for thread in filter(None, (known() for known in self._threads)):
            thread.held.clear()

    def end(self, results: Iterable[object], worn: Worn) -> None:
        """Ends what `begin` began; `worn` is known as long as these results can be differentiated."""
        here = self._here()
        if here.stretches:
            here.stretches[-1].end = _next_number()
        for result in results:
            node = getattr(result, "grad_fn", None)
            if node is not None:
                node.metadata.setdefault("ia3", []).append((worn, here))

    def find(self) -> Worn | None:
        """What was worn when that was recorded which is computed again now; None where nothing is.

        Raises:
            RuntimeError: it is not known.
        """
        node = torch._C._current_autograd_node()
        is_function = isinstance(node, BackwardCFunction)
        if is_function and self in (wrapped := getattr(node, _WRAPPED, {})):
            return wrapped[self]  # type: ignore[no-any-return]
        if not is_function and not is_checkpointing(sys._getframe(1)):
            return None  # a forward of its own, called by a hook
        number = -1 if node is None else node._sequence_nr()
        found = self._recorded(number)
        if len(found) == 1:
            return next(iter(found.values()))
        if not found:
            raise RuntimeError(
                "a layer is computed again for a gradient (gradient checkpointing), and it is not known in which "
                "forward it was computed first: its result is gone. Keep what the model returned until backward()"
            )
        raise RuntimeError(
            "a layer is computed again for a gradient (gradient checkpointing), and forwards of several threads, which "
            "wore different adapters, come into question: train in one thread, or without checkpointing"
        )

    def _recorded(self, number: int) -> dict[int, Worn]:
        """What was worn, by identity, where a thread recorded this number."""
        here = self._here()  # of a device's own thread, which numbers what it records by itself
        return {
            id(worn): worn
            for thread in filter(None, (known() for known in self._threads))
            for stretch in list(thread.stretches)
            if stretch.begin <= number < (min(stretch.end, _next_number()) if thread is here else stretch.end)
            and (worn := stretch.worn()) is not None
        }

    def _here(self) -> _Thread:
        """What this thread has."""
        here: _Thread | None = getattr(self._local, "thread", None)
        if here is None:
            here = self._local.thread = _Thread()
            with self._lock:
                self._threads = [*(known for known in self._threads if known() is not None), weakref.ref(here)]
        return here

    def _begin_unrecorded(self, worn: Worn) -> None:
        """The same where nothing is recorded: a function of autograd's may run the whole forward again.

        The reentrant way of checkpointing is such a function, and what was worn is known as long as it can run it.
        """
        if _next_number() == 0:
            return  # this thread has recorded nothing yet
        worn = worn.of or worn
        for function in _functions(sys._getframe(1)):
            worn.lent = True
            vars(function).setdefault(_WRAPPED, {})[self] = worn

    def __deepcopy__(self, memo: object) -> PastForwards:
        """Nothing of it: no gradient reaches a copied model from the original's forwards."""
        return PastForwards()


def _functions(frame: FrameType | None) -> Iterator[BackwardCFunction]:
    """The functions of autograd's that are running forwards, and have called this."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:  # as autograd has them called
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, BackwardCFunction):
                yield first
        frame = frame.f_back


def is_checkpointing(frame: FrameType | None) -> bool:
    """Whether some code for checkpointing has called this, in whatever library.

    It is in a file of that name that defines a function of autograd's. A user's script may have the name too.
    """
    while frame is not None:
        is_named_so = "checkpoint" in frame.f_code.co_filename.rpartition("/")[2]
        if is_named_so and any(_is_function_of(frame.f_globals, each) for each in list(frame.f_globals.values())):
            return True
        frame = frame.f_back
    return False


def _is_function_of(module: dict[str, Any], defined: object) -> bool:
    return (
        isinstance(defined, type)
        and issubclass(defined, torch.autograd.Function)
        and defined.__module__ == module["__name__"]
    )
