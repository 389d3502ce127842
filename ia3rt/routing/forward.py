"""One forward of a patched model, from its hook before to its hook after."""

from __future__ import annotations

import sys
from contextvars import Token
from enum import Enum
from types import FrameType

from torch import nn

from ia3rt.routing.guard import Watch
from ia3rt.routing.marks import Marks
from ia3rt.routing.wearing import Wearing
from ia3rt.routing.worn import Worn


class Part(Enum):
    """What of a model's forward is run."""

    WHOLE = "all of it, or a part over rows as its own batch has them"
    IMAGES = "what sees images, called by itself: its batch is the images"
    AHEAD = "what comes before the text is read, with the whole batch at hand"


class Forward:
    """A forward that is running.

    Attributes:
        worn: what its rows wear, from its beginning to its end.
        wearing: the same for compiled parts of the model.
        owner: the module that was called.
        part: what of the model's forward it is.
        sees: whether images or the like are among its inputs.
        frame: of the call; what a forward is in that was interrupted by Ctrl-C is on no stack any more.
        outer: the forward that a backward pass inside it computes this one for, if any.
        token: what takes it back that the context is in it.
        tokens: of each row of its batch; None where that has none.
        calls: how many calls of the owner are running, one inside another.
        task: the backward pass that it runs in; -1 where in none.
        most: how many tokens its batch has, where all come after a route's start and a cache holds those before.
        kind: what it has in common with others that lay out their rows as it does; where marks follow it.
        marks: what follows one row of the batch through it, where it is not known yet how the model lays rows out.
        image_marks: the same for one of the images beside the text.
        watch: what sees which layers it reaches, where that is not known yet.
        placed: `worn` as layers on each device of the bank read it; None where they have not asked yet.
        ahead: what was computed for a layer before it was called; by whoever computed it.
        handled: the exception that was being handled when it began, if any: another one, at its end, is its own.
    """

    def __init__(self, worn: Worn, owner: nn.Module, task: int, outer: Forward | None, frame: FrameType) -> None:
        self.worn = worn
        self.wearing = Wearing(worn)
        self.owner = owner
        self.task = task
        self.outer = outer
        self.frame = frame
        self.part = Part.WHOLE
        self.sees = False
        self.token: Token[Forward | None] | None = None
        self.tokens: int | None = None
        self.calls = 1
        self.most: int | None = None
        self.kind: object = None
        self.marks: Marks | None = None
        self.image_marks: Marks | None = None
        self.watch: Watch | None = None
        self.placed: list[Worn] | None = None
        self.ahead: dict[object, object] = {}
        self.handled = sys.exc_info()[1]

    def is_running(self, frame: FrameType | None) -> bool:
        """Whether `frame`, of a call in the same thread, is inside of this forward."""
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None
