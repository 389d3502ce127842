"""Lets one thread at a time change the adapters of a model, or what is worn, which reads the model's own parts then."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ia3rt.modules.parts import ReadingTheModels
from ia3rt.routing.routing import Routing


class _OfAModel(Protocol):
    """What has the routing of one patched model, whose lock it takes."""

    _routing: Routing


S = TypeVar("S", bound=_OfAModel)
P = ParamSpec("P")
R = TypeVar("R")


def alone(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Lets no two threads run such methods of one model at once; forwards go on meanwhile.

    The methods read the parts that the model had before patch(), not an adapter's own in their places.
    """

    @functools.wraps(method)
    def run(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._routing.lock, ReadingTheModels():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]
