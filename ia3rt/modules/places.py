"""Where the layers that wear vectors stand in a model, and whether what leads to them is as it was."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn


class _Edge(NamedTuple):
    parent: nn.Module
    name: str
    child: nn.Module


class Places:
    """The layers at some paths of a model, and the modules around them.

    Args:
        modules: the model's, by path, as they are when the vectors are placed.
        paths: the layers'.

    Attributes:
        root: the model.
        layers: the layers, by path.
    """

    def __init__(self, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> None:
        self.root = modules[""]
        self.layers = {path: modules[path] for path in paths}
        self._chains = {path: list(_chain(modules, path)) for path in self.layers}
        self._state: _State | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Places:
        """Those of a copied model, which looks at itself again."""
        made = memo[id(self)] = Places.__new__(Places)
        made.root = copy.deepcopy(self.root, memo)
        made.layers = copy.deepcopy(self.layers, memo)
        made._chains = copy.deepcopy(self._chains, memo)
        made._state = None
        return made

    def have_changed(self) -> bool:
        """Whether modules, their classes or forwards on the way to a layer are others than at the last `note`."""
        return self._state is None or self._state.has_changed()

    def modules(self) -> dict[str, nn.Module]:
        """The model's, by path, as they are now."""
        return dict(self.root.named_modules())

    def note(self) -> None:
        """Takes what is there now for what is to be there."""
        now = self.modules()
        paths = {module: path for path, module in now.items()}
        moved = [_chain(now, paths[layer]) for layer in self.layers.values() if layer in paths]
        edges = {(id(edge.parent), edge.name): edge for chain in (*self._chains.values(), *moved) for edge in chain}
        self._state = _State(self.root, list(edges.values()))

    def check(self) -> None:
        """Sees to it that no other module stands in a layer's place, or in that of one around it.

        A layer may stand elsewhere in the model, as in a wrapper, or in no place any more.

        Raises:
            ValueError: one does.
        """
        there = set(self.root.modules())
        known = {edge.child for chain in self._chains.values() for edge in chain}
        for path, layer in self.layers.items():
            found = None if layer in there else _replaced(self._chains[path], known)
            if found is not None:
                place, present = found
                wears = "wears no vector" if place == path else f"has no layer that wears the vectors of {path!r}"
                raise ValueError(
                    f"a {type(present).__name__} was put in the place of {place!r} after patch(), and {wears}: "
                    "unpatch() before modules are replaced, and patch() the model again"
                )


def _chain(modules: Mapping[str, nn.Module], path: str) -> Iterator[_Edge]:
    """From the model down to the module at `path`."""
    parts = path.split(".") if path else []
    for depth, name in enumerate(parts, 1):
        yield _Edge(modules[".".join(parts[: depth - 1])], name, modules[".".join(parts[:depth])])


def _replaced(chain: list[_Edge], known: Container[nn.Module]) -> tuple[str, nn.Module] | None:
    """What stands in the place of a module of the chain, and where; None where only a place is gone.

    A module that stood elsewhere on the way to a layer has moved there, as others were taken out before it. A container
    of the same kind, as a list of other layers, is no replacement by itself; nor is one without any tensor,
    which computes nothing that a vector could scale.
    """
    present: nn.Module | None = chain[0].parent if chain else None
    for depth, edge in enumerate(chain, 1):
        present = present._modules.get(edge.name) if present is not None else None
        if present is None:
            return None
        if present is edge.child or _are_lists(present, edge.child):
            continue
        if present in known:
            return None
        if depth < len(chain) and not any(True for _ in (*present.parameters(), *present.buffers())):
            return None
        return ".".join(each.name for each in chain[:depth]), present
    return None


def _are_lists(present: nn.Module, child: nn.Module) -> bool:
    kinds = nn.ModuleList, nn.ModuleDict, nn.Sequential
    return any(isinstance(present, kind) and isinstance(child, kind) for kind in kinds)


class _State:
    """What leads from a model to its layers. It is compared before each forward: in as little Python as can be."""

    def __init__(self, root: nn.Module, edges: list[_Edge]) -> None:
        self._children = [module._modules for module in dict.fromkeys(edge.parent for edge in edges)]
        self._children_then = list(map(dict, self._children))
        self._modules = list(dict.fromkeys([root, *(edge.parent for edge in edges), *(edge.child for edge in edges)]))
        self._types = list(map(type, self._modules))
        self._held = list(map(vars, self._modules))
        self._have_forwards = ["forward" in held for held in self._held]
        self._with_forward = [held for held in self._held if "forward" in held]
        self._forwards = [held["forward"] for held in self._with_forward]
        bases = (base for cls in dict.fromkeys(self._types) for base in cls.__mro__ if "forward" in vars(base))
        self._classes: list[Any] = list(dict.fromkeys(bases))
        self._class_forwards = [cls.forward for cls in self._classes]

    def has_changed(self) -> bool:
        return (
            self._children != self._children_then
            or list(map(type, self._modules)) != self._types
            or ["forward" in held for held in self._held] != self._have_forwards
            or [held["forward"] for held in self._with_forward] != self._forwards
            or [cls.forward for cls in self._classes] != self._class_forwards
        )
