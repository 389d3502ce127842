"""Sees to it, before each forward of a model, that it still reaches its layers: a vector is never lost silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ia3rt.modules.readers import is_only_read
from ia3rt.modules.set_forward import is_reached


class Reached:
    """The layers that wear vectors, at their places in a model."""

    def __init__(self) -> None:
        self._places: list[tuple[str, nn.Module, str, nn.Module]] = []
        self._seen: dict[str, tuple[object, ...]] = {}
        torch.compiler.assume_constant_result(_check)  # type: ignore[no-untyped-call]

    def place(self, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> None:
        """Says which layers those are, now."""
        self._places = []
        for path in dict.fromkeys(paths):
            parent, _, name = path.rpartition(".")
            self._places.append((path, modules[parent], name, modules[path]))

    def before_forward(self, *_: object) -> None:
        """A forward pre-hook of the model.

        Raises:
            ValueError: other code has set a forward on a layer, or around it, that hides its vectors, or has put
                another module in its place.
        """
        for path, parent, name, layer in self._places:
            if parent._modules.get(name) is not layer or "forward" in layer.__dict__ or "forward" in parent.__dict__:
                self._look(path, parent, name, layer)

    def _look(self, path: str, parent: nn.Module, name: str, layer: nn.Module) -> None:
        """Checks one layer, once for what other code has put there."""
        present = parent._modules.get(name)
        if torch.compiler.is_compiling():
            return _check(path, parent, name, layer, present)
        state = present, vars(layer).get("forward"), vars(parent).get("forward")
        if self._seen.get(path) != state:
            _check(path, parent, name, layer, present)
            self._seen[path] = state
        return None


def _check(path: str, parent: nn.Module, name: str, layer: nn.Module, present: nn.Module | None) -> None:
    """Raises `before_forward`'s errors. A compiler runs it when it traces, and traces again when a forward was set."""
    if present is not None and all(module is not layer for module in present.modules()):
        raise ValueError(
            f"a {type(present).__name__} was put in the place of {path!r} after patch(), and wears no vector: "
            "unpatch() before modules are replaced, and patch() the model again"
        )
    if not is_reached(layer):
        raise ValueError(
            f"module {path!r} has a forward of its own, set by other code after patch(), which hides its vectors: "
            "delete it, use a hook instead, or let it call the forward that it replaces"
        )
    if is_only_read(parent, name):
        raise ValueError(
            f"the forward set by other code, after patch(), on the {type(parent).__name__} around {path!r} reads its "
            "weight and never calls it, which hides its vectors: let it call the module"
        )
