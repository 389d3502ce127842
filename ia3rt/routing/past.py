"""Which forward a backward pass computes again: what its layers wear was decided when it began.

Gradient checkpointing throws away what a block computed, and runs the block again when its gradient is wanted, outside
of any forward and whatever is worn then. Autograd numbers what it records, thread by thread, in the order of recording.
So the number of what is being differentiated says in which forward of its thread it was recorded.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ia3rt.routing.worn import Worn

_next_number = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
_HELD = 16  # what was worn is known as long as the result is, or as the last of these are


@dataclass
class _Stretch:
    """What was worn while autograd gave out these numbers."""

    begin: int
    end: float
    worn: weakref.ref[Worn]


class PastForwards:
    """What was worn while autograd recorded what it holds now."""

    def __init__(self) -> None:
        self._stretches: dict[int, list[_Stretch]] = {}
        self._held: deque[Worn] = deque(maxlen=_HELD)

    def note(self, worn: Worn) -> None:
        """Says that what is recorded from here on, in this thread, is computed with `worn`."""
        stretches = self._stretches.setdefault(threading.get_ident(), [])
        if stretches and stretches[-1].worn() is worn:
            return
        begin = _next_number()
        if stretches:
            stretches[-1].end = begin
        stretches[:] = [stretch for stretch in stretches if stretch.worn() is not None]
        stretches.append(_Stretch(begin, float("inf"), weakref.ref(worn)))
        self._held.append(worn)

    def keep(self, results: Iterable[object], worn: Worn) -> None:
        """Lets `worn` be known as long as these results of a forward can be differentiated."""
        for result in results:
            node = getattr(result, "grad_fn", None)
            if node is not None:
                node.metadata.setdefault("ia3", []).append(worn)

    def find(self) -> Worn:
        """What was worn when that was recorded which is differentiated now.

        Raises:
            RuntimeError: it is not known.
        """
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        found = {
            id(worn): worn
            for stretches in list(self._stretches.values())
            for stretch in list(stretches)
            if stretch.begin <= number < stretch.end and (worn := stretch.worn()) is not None
        }
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

    def __deepcopy__(self, memo: object) -> PastForwards:
        """Nothing of it: no gradient reaches a copied model from the original's forwards."""
        return PastForwards()
