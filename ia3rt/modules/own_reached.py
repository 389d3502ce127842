"""Sees to it, before each forward, that it still reaches the modules of which adapters have their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ia3rt.modules.first_hook import register_first
from ia3rt.modules.set_forward import is_reached
from ia3rt.routing.hooks import Hook, models_in, nothing
from ia3rt.routing.routing import Routing


class _Place(NamedTuple):
    """Where one of them stood when an adapter's own was put beside it, and its rows if it is an embedding."""

    path: str
    parent: nn.Module
    name: str
    module: nn.Module
    rows: int | None


class OwnReached:
    """These modules, at their places in a model. A model without any has no hook.

    Args:
        model: the model.
        routing: tells whether a forward of the model goes on, which was looked at as it began.
    """

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        self._model = model
        self._routing = routing
        self._edges: list[tuple[nn.Module, str, nn.Module]] = []
        self._places: list[_Place] = []
        self._seen: object = None
        self._hooks: list[RemovableHandle] = []
        self._prepare()

    def _prepare(self) -> None:
        model, places = self._model, self._places
        # Without arguments: a compiler takes no model for a constant.
        check = torch.compiler.assume_constant_result(lambda: _check(model, places))  # type: ignore[no-untyped-call]
        self._check: Callable[[], None] = check

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnReached:
        """That of a copied model."""
        made = memo[id(self)] = OwnReached.__new__(OwnReached)
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "_check"})
        made._prepare()
        return made

    def place(self, modules: Mapping[str, nn.Module]) -> None:
        """Says which modules those are, by path; none takes everything back. One stays where it stood at first."""
        known = {place.path: place for place in self._places}
        for path, module in modules.items():
            if path not in known or known[path].module is not module:
                way = list(_way(self._model, path))
                parent, name, _ = way[-1]
                known[path] = _Place(path, parent, name, module, vars(module).get("num_embeddings"))
                self._edges += [edge for edge in way if edge not in self._edges]
        self._places = [known[path] for path in modules]
        self._seen = None
        self._prepare()
        if not modules:
            self._edges = []
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
        elif not self._hooks:
            for each in models_in(self._model):
                look = self._before_forward if each is self._model else self._before_part
                traced = look if each is self._model else nothing
                self._hooks.append(register_first(each, Hook(self._routing, look, traced)))

    def _before_part(self, *args: object) -> None:
        if self._routing.forward() is None:
            self._before_forward()

    def _before_forward(self, *args: object) -> None:
        """A forward pre-hook.

        Raises:
            ValueError: other code has put another module in the place of one or around it, has set a forward on it, or
                resized it, so that what is worn would be lost.
        """
        for parent, name, child in self._edges:
            if parent._modules.get(name) is not child:
                return self._look()
        for _, _, _, module, rows in self._places:
            if "forward" in module.__dict__ or (rows is not None and module.__dict__["num_embeddings"] != rows):
                return self._look()
        return None

    def _look(self) -> None:
        """Checks them all, once for what other code has put there."""
        if torch.compiler.is_compiling():
            return self._check()
        present = [parent._modules.get(name) for parent, name, _ in self._edges]
        changed = [(vars(place.module).get("forward"), _rows(place.module)) for place in self._places]
        if self._seen != (present, changed):
            self._check()
            self._seen = present, changed
        return None


def _rows(module: nn.Module) -> object:
    return vars(module).get("num_embeddings")


def _way(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """From the model to a module."""
    for name in path.split("."):
        child = model._modules[name]
        assert child is not None
        yield model, name, child
        model = child


def _at(model: nn.Module, path: str) -> nn.Module | None:
    present: nn.Module | None = model
    for name in path.split("."):
        present = None if present is None else present._modules.get(name)
    return present


def _check(model: nn.Module, places: list[_Place]) -> None:
    """Raises the errors of a forward. A compiler runs it when it traces, and traces again when something was put."""
    reached = {id(module) for module in model.modules()}
    for path, parent, name, module, rows in places:
        present = _at(model, path)
        # What was taken out runs no more, and other layers may have taken its place: those are no error.
        is_elsewhere = parent._modules.get(name) is module and id(module) in reached
        is_another = present is not None and all(present is not place.module for place in places)
        if is_another and not is_elsewhere and all(each is not module for each in present.modules()):  # type: ignore[union-attr]
            raise ValueError(
                f"a {type(present).__name__} was put in the place of {path!r}, or around it, after patch(), and goes "
                "past the adapters' own: unpatch() before modules are replaced or embeddings resized, and patch() the "
                "model again"
            )
        if not is_reached(module):
            raise ValueError(
                f"module {path!r} has a forward of its own, set by other code after patch(), which hides the "
                "adapters' own: delete it, use a hook instead, or let it call the forward that it replaces"
            )
        if rows is not None and _rows(module) != rows:
            raise ValueError(
                f"{path!r} had {rows} rows when an adapter's own was put beside it, and has {_rows(module)} now: load "
                "the model anew, and call model.resize_token_embeddings() before patch()"
            )
