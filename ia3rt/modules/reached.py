"""Sees to it that the forwards of a model reach its layers: a vector is never lost silently."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.modules.experts import IA3Experts
from ia3rt.modules.fused_copies import check_unfused
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.places import Places
from ia3rt.modules.readers import reader_of
from ia3rt.modules.set_forward import is_reached
from ia3rt.modules.watch import Watch
from ia3rt.modules.wearer import Wearer


class Reached:
    """Of the layers that wear vectors: a `Guard` of their model's forwards.

    The first forward of each kind is watched: after patch(), and after other code has put something on the way.

    Args:
        modules: the model's, by path.
        paths: the layers'.
    """

    def __init__(self, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> None:
        self._begin(Places(modules, dict.fromkeys(paths)))

    def _begin(self, places: Places) -> None:
        self._places = places
        self._watched: set[object] = set()
        self._paths = "\n".join(places.layers)
        self._look = _constant(lambda: _check(places))
        self._look_beside = _constant(lambda: check_unfused(places.modules(), places.layers.values()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Reached:
        """The guard of a copied model."""
        made = memo[id(self)] = Reached.__new__(Reached)
        made._begin(copy.deepcopy(self._places, memo))
        return made

    def check(self, is_compiled: bool) -> None:
        """Looks, before a forward, whether anything on the way to a layer is another one than at the last look.

        Args:
            is_compiled: whether the forward is, so that nothing can watch it.

        Raises:
            ValueError: other code has put another module in the place of a layer or of what is around it; or a
                compiled forward hides a layer's vectors, as far as its code says so.
        """
        if not self._places.have_changed():
            return
        self._places.check()
        if is_compiled:
            _check_as_read(self._places)
        for layer in self._places.layers.values():
            if isinstance(layer, Wearer):
                layer.ia3_routing.settle()  # accelerate's dispatch_model puts weights elsewhere, and moves no module
                break
        self._places.note()
        self._watched = set()

    def traced(self, model: nn.Module) -> None:
        """`check` where a compiled function calls the model, so that a compiler reads this. Raises as `check`."""
        # Where `forward` is looked up, a compiler traces again once another is set; not by `__dict__` alone.
        for path in self._paths.split("\n"):  # one text: compiled code checks each that it reads, at every call
            module: nn.Module | None = model
            for name in filter(None, path.split(".")):
                module = None if module is None else module._modules.get(name)
                if module is None or module.forward is None or "forward" in module.__dict__:
                    break
            if not isinstance(module, (IA3Layer, IA3Experts)) or "forward" in module.__dict__:
                self._look()
                return
        self._look_beside()

    def watch(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Watch | None:
        """What watches a forward of the model, or of a model in it, where none of its kind was watched."""
        kind = model, model.training, torch.is_grad_enabled(), _is_one_token(args, kwargs)
        if kind in self._watched:
            return None
        watched = self._watched
        places = self._places
        return Watch(places.layers, places.modules, lambda: watched.add(kind), lambda: _check_as_read(places))


def _is_one_token(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is a step of decoding, for which models have code of its own."""
    x = args[0] if args else kwargs.get("input_ids")
    if x is None:
        x = kwargs.get("decoder_input_ids")
    return isinstance(x, Tensor) and x.dim() > 1 and x.size(1) == 1


def _constant(function: Callable[[], None]) -> Callable[[], None]:
    return torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call, no-any-return]


def _check(places: Places) -> None:
    places.check()
    _check_as_read(places)


def _check_as_read(places: Places) -> None:
    """Raises ValueError where a forward hides a layer's vectors, by what its code says."""
    modules = places.modules()
    paths = {module: path for path, module in modules.items()}
    check_unfused(modules, places.layers.values())
    for path, layer in places.layers.items():
        if layer not in paths:
            continue
        if not is_reached(layer):
            raise ValueError(
                f"module {path!r} has a forward of its own, set by other code after patch(), which hides its vectors: "
                "delete it, use a hook instead, or let it call the forward that it replaces"
            )
        reader = reader_of(modules, paths[layer])
        if reader is not None:
            raise ValueError(
                f"the forward set by other code, after patch(), on the {type(reader).__name__} around {path!r} reads "
                "its weight and never calls it, which hides its vectors: let it call the module"
            )
