"""The drop-ins of one model: which of its modules apply the bank's sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from torch import nn
from torch.utils.hooks import RemovableHandle

from ia3rt.adapters.site import Side, Site
from ia3rt.modules.experts import IA3Experts
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.pair import pair_layers
from ia3rt.modules.reached import Reached
from ia3rt.modules.readers import call_layers
from ia3rt.modules.wearer import Wearer, place, unwrap, wrap
from ia3rt.modules.wearers import wearers_of
from ia3rt.routing.routing import Routing

_SIDES: tuple[Side, ...] = ("in", "out")


class DropIns:
    """Makes modules of a model drop-ins, and gives them back.

    Args:
        model: the model.
        routing: what its rows wear.
        follow: what a drop-in calls, with itself, when it may have been moved to another device.

    Attributes:
        layers: the drop-in at each site, wherever that stands in the model by now.
    """

    def __init__(self, model: nn.Module, routing: Routing, follow: Callable[[nn.Module], None]) -> None:
        self._model = model
        self._routing = routing
        self._follow = follow
        self.layers: dict[Site, nn.Module] = {}
        self._hooks: list[RemovableHandle] = []
        self._applied: dict[nn.Module, int] = {}  # the position of a site that a drop-in applies

    def place(self, sites: Iterable[Site]) -> None:
        """Makes the modules that apply `sites` drop-ins, and no others, whatever was there before.

        Where it fails half way, what was there before is placed by another call.

        Raises:
            ValueError: a module is another runtime's drop-in, or of a class that lets no other be made of it.
        """
        sites = list(sites)
        modules, before = self._by_name(), list(self._applied)
        wearing: dict[nn.Module, dict[Side, int]] = {}
        self._applied = {}
        self.layers = {site: modules[site.module] for site in sites}
        for position, site in enumerate(sites):
            for module, mixin in wearers_of(modules, site, self._routing.backend):
                self._wrap(module, mixin, site)
                wearing.setdefault(module, {})
                self._applied[module] = position
            wearing[modules[site.module]][site.side] = position
            self._routing.composes |= not IA3Layer.is_fused(modules[site.module])
        for module in dict.fromkeys([*modules.values(), *before]):  # of the latter some may be out of the model
            if self._is_ours(module) and module not in wearing:
                unwrap(module)
        for module, positions in wearing.items():
            for side in _SIDES if isinstance(module, (IA3Layer, IA3Experts)) else ():
                place(module, side, positions.get(side))
        self.settle()
        self._see_that_they_are_reached(modules, [site.module for site in sites])

    def check_in_place(self) -> None:
        """Sees to it that the layers that wear vectors are those that their sites name, maybe with others around them.

        Raises:
            ValueError: one was moved, or taken out of the model, so that its name means another layer or none.
        """
        paths: dict[nn.Module, str] = {}
        for site, layer in self.layers.items():
            if _find(self._model, site.module) is layer:
                continue
            paths = paths or {module: path for path, module in self._model.named_modules()}
            if layer not in paths or not _leads_through(site.module, paths[layer]):
                where = f"stands at {paths[layer]!r} now" if layer in paths else "is in the model no more"
                raise ValueError(
                    f"the layer that wears the vectors of {site.module!r} {where}, so that adapters cannot be told by "
                    "the names of layers: unpatch() before layers are moved or taken out, and patch() the model again"
                )

    def check_alone(self) -> None:
        """Sees to it that nothing stands around a layer that wears vectors, in its place, as a LoRA's layer does.

        Raises:
            ValueError: something does; or as `check_in_place`.
        """
        self.check_in_place()
        for site, layer in self.layers.items():
            found = _find(self._model, site.module)
            if found is not layer:
                raise ValueError(
                    f"a {type(found).__name__} was put around the layer {site.module!r} after patch(), and has its "
                    "weight and others: take it away before this (of PEFT's adapters, unload() or merge_and_unload())"
                )

    def settle(self) -> None:
        """Lets each drop-in read what is worn where its vectors lie: looked up here, and not at each call.

        And pairs those that lie together, for kernels that compute two of them.
        """
        routing, bank = self._routing, self._routing.bank
        for module, position in self._applied.items():
            here = routing.now if len(bank.tables) == 1 else partial(routing.now_on, bank.places[position])
            vars(module)["ia3_now"] = here
        if routing.backend == "triton":
            layers = {site.module: layer for site, layer in self.layers.items()}
            pair_layers(layers, layers)

    def _by_name(self) -> dict[str, nn.Module]:
        """The model's modules by path; on the way to a layer by the names of before others were put around."""
        modules = dict(self._model.named_modules())
        paths = {module: path for path, module in modules.items()}
        for site, layer in self.layers.items():
            for known, present in _on_the_way(site.module, paths.get(layer, site.module)):
                modules.setdefault(known, modules.get(present, layer))
            modules[site.module] = layer
        return modules

    def _wrap(self, module: nn.Module, mixin: type[Wearer], site: Site) -> None:
        if not isinstance(module, Wearer):
            try:
                wrap(module, mixin, self._routing, self._follow)
            except TypeError as error:  # what Python and metaclasses raise
                kind = type(module).__name__
                raise ValueError(
                    f"{site.path!r} cannot be patched, as no class can be made of {kind}: {error}"
                ) from error
        elif not self._is_ours(module):
            raise ValueError(
                f"{site.path!r} is patched already, as a part of the model that was given to patch() by itself: "
                "unpatch() its Runtime first"
            )

    def _see_that_they_are_reached(self, modules: Mapping[str, nn.Module], paths: list[str]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = call_layers(modules, paths)
        self._routing.guard = None
        if paths:
            self._routing.guard = Reached(modules, paths)

    def _is_ours(self, module: nn.Module) -> bool:
        return isinstance(module, Wearer) and module.ia3_routing is self._routing


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _leads_through(path: str, now: str) -> bool:
    """Whether a path is another one with names of wrappers in it."""
    return path in dict(_on_the_way(path, now))


def _on_the_way(path: str, now: str) -> Iterator[tuple[str, str]]:
    """Each module's path on the way to `path`, and what that is on the way `now`, with names of wrappers in it."""
    names, known = path.split("."), 0
    parts = now.split(".")
    for count, part in enumerate(parts, 1):
        if known < len(names) and part == names[known]:
            known += 1
            yield ".".join(names[:known]), ".".join(parts[:count])
