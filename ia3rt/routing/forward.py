"""One forward of a patched model, from its hook before to its hook after."""

from __future__ import annotations

from torch import nn

from ia3rt.routing.guard import Watch
from ia3rt.routing.marks import Marks
from ia3rt.routing.wearing import Wearing
from ia3rt.routing.worn import Worn


class Forward:
    """A forward that is running.

    Attributes:
        worn: what its rows wear, from its beginning to its end.
        wearing: the same for compiled parts of the model.
        owner: the module that was called.
        outer: the forward that a backward pass inside it computes this one for, if any.
        calls: how many calls of the owner are running, one inside another.
        task: the backward pass that it runs in; -1 where in none.
        kind: what it has in common with others that lay out their rows as it does; where marks follow it.
        marks: what follows one row of the batch through it, where it is not known yet how the model lays rows out.
        image_marks: the same for one of the images beside the text.
        watch: what sees which layers it reaches, where that is not known yet.
        ahead: what was computed for a layer before it was called; by whoever computed it.
    """

    def __init__(self, worn: Worn, owner: nn.Module, task: int, outer: Forward | None) -> None:
        self.worn = worn
        self.wearing = Wearing(worn)
        self.owner = owner
        self.task = task
        self.outer = outer
        self.calls = 1
        self.kind: object = None
        self.marks: Marks | None = None
        self.image_marks: Marks | None = None
        self.watch: Watch | None = None
        self.ahead: dict[object, object] = {}
