"""The `with` of a route: what was worn before comes back at its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from ia3rt.routing.routing import Routing
from ia3rt.routing.wearing import Wearing


class Entering(AbstractContextManager[None]):
    """Of one call of `route`, which takes effect when it is called: it is entered there, once.

    Args:
        routing: of the model.
        before: what was worn before the call.
        is_patched: whether the model still is.
    """

    def __init__(self, routing: Routing, before: Wearing, is_patched: Callable[[], bool]) -> None:
        self._routing = routing
        self._before = before
        self._is_patched = is_patched
        self._own = routing.context.wearing
        self._is_entered = False

    def __enter__(self) -> None:
        """Begins it.

        Raises:
            RuntimeError: it was entered before, or something else is worn by now.
        """
        if self._is_entered:
            raise RuntimeError("this route was entered before, and is entered once: call route() again for each `with`")
        if self._routing.context.wearing is not self._own:
            raise RuntimeError(
                "a route takes effect when route() is called, for the thread or task that calls it, and by now "
                "something else is worn here: call it in the statement that enters it, `with rt.route(…):`"
            )
        self._is_entered = True
        self._within = self._routing.hold()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Makes what was worn before worn again, unless the model was unpatched meanwhile."""
        if self._is_patched():
            self._routing.wear_again(self._before, self._within, stacklevel=3)
