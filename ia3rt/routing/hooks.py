"""The hooks by which a model's forwards are bound to what is worn; a copy of a part of the model has none that act."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from ia3rt.routing.routing import Routing


class Hook:
    """A method of a Routing as a hook.

    It is copied with the whole model, whose copy has a Routing of its own. With a part of it, of which no Runtime says
    what it wears, it becomes one that does nothing.
    """

    def __new__(cls, routing: Routing, method: str) -> Hook:
        """One whose code is its own: a compiler counts by code what it compiled, and stops at eight."""
        call = Hook.__call__
        own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__)
        return object.__new__(type("Hook", (Hook,), {"__call__": own, "__module__": __name__}))

    def __init__(self, routing: Routing, method: str) -> None:
        self._routing, self._method = routing, method
        self.run: Callable[..., None] = getattr(routing, method)

    def __call__(self, *args: Any) -> None:
        """What the method does."""
        self.run(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        """The same of the copied model, or nothing."""
        if not self._routing.is_copied(memo):
            return _nothing
        return Hook(copy.deepcopy(self._routing, memo), self._method)


def _nothing(*args: object) -> None:
    return None


def install(model: nn.Module, routing: Routing) -> list[RemovableHandle]:
    """Lets a forward of the model, and of each model inside it, bind what is worn; gives what takes that back."""
    hooks: list[RemovableHandle] = []
    for module in models_in(model):
        what = "forward" if module is model else "part"
        hooks.append(module.register_forward_pre_hook(Hook(routing, f"before_{what}"), with_kwargs=True))
        hooks.append(module.register_forward_hook(Hook(routing, f"after_{what}"), always_call=True))
    return hooks


def models_in(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and those inside it that may be called without it, as `generate` calls an encoder."""
    return (module for module in model.modules() if module is model or hasattr(module, "main_input_name"))
