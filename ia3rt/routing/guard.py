"""What is asked before a forward whether it reaches the layers that wear vectors: of modules, which stand above."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import nn


class Watch(Protocol):
    """What sees, in one forward, which layers it reaches."""

    def start(self, ended: Callable[[], object]) -> None:
        """Begins to look, as the last thing before the forward; calls `ended` where that ends and calls no hooks."""

    def end(self, completed: bool) -> None:
        """Ends it, after a forward or its error; raises ValueError where a completed one did not reach a layer."""


class Guard(Protocol):
    """What sees to it that the forwards of a model reach its layers."""

    def check(self, is_compiled: bool) -> None:
        """Raises ValueError where that is seen not to be, before any forward. Nothing watches a compiled one."""

    def traced(self, model: nn.Module) -> None:
        """The same where a compiler reads it."""

    def watch(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Watch | None:
        """What has to watch this forward, if anything."""
