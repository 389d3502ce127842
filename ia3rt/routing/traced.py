"""Whether what is done now is also done later, for rows that wear something else; how a compiler finds a Routing."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ia3rt.routing.routing import Routing

_keys = itertools.count()
_routings: dict[int, weakref.ref[Routing]] = {}


def know(routing: Routing) -> int:
    """The key by which `routing_of` finds it, as long as it lives."""
    key = next(_keys)
    _routings[key] = weakref.ref(routing, lambda _: _routings.pop(key, None))
    return key


def routing_of(key: int) -> Routing:
    """The Routing of a model, as its drop-ins ask for it where a compiler reads them.

    Compiled code checks at each call that what it found in two places to be one object still is, in Python: for a
    drop-in's own reference that took as long as all else that it checks of a layer. Here it finds it in one place.
    """
    routing = _routings[key]()
    assert routing is not None  # a drop-in holds it
    return routing


def is_traced() -> bool:
    """Whether a compiler or an export reads this; not where such a one calls code that it does not read.

    `torch.compiler.is_compiling` is true there too.
    """
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph captures what is done with x."""
    return not is_traced() and x.is_cuda and torch.cuda.is_current_stream_capturing()
