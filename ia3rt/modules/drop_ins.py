"""The drop-ins of one model: which of its modules apply the bank's sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ia3rt.adapters.site import Side, Site
from ia3rt.modules.pair import pair_layers
from ia3rt.modules.wearer import Wearer, is_altered, place, unwrap, wrap
from ia3rt.modules.wearers import wearer_of
from ia3rt.routing.routing import Routing

_SIDES: tuple[Side, ...] = ("in", "out")


class DropIns:
    """Makes modules of a model drop-ins, and gives them back.

    Args:
        model: the model.
        routing: what its rows wear.
        follow: what a drop-in calls when it was moved to another device.
    """

    def __init__(self, model: nn.Module, routing: Routing, follow: Callable[[torch.device], None]) -> None:
        self._model = model
        self._routing = routing
        self._follow = follow

    def place(self, sites: Iterable[Site]) -> None:
        """Makes the modules that apply `sites` drop-ins, and no others, whatever was there before.

        Where it fails half way, what was there before is placed by another call.

        Raises:
            ValueError: a module is another runtime's drop-in, or of a class that lets no other be made of it.
            RuntimeError: as `check`.
        """
        sites = list(sites)
        self.check()
        modules = dict(self._model.named_modules())
        wearing: dict[nn.Module, dict[Side, int]] = {}
        for position, site in enumerate(sites):
            module, mixin = wearer_of(modules, site, self._routing.backend)
            if not isinstance(module, Wearer):
                try:
                    wrap(module, mixin, self._routing, self._follow)
                except TypeError as error:  # what Python and metaclasses raise
                    kind = type(module).__name__
                    raise ValueError(
                        f"{site.path!r} cannot be patched, as no class can be made of {kind}: {error}"
                    ) from error
                self._routing.composes |= not mixin.is_fused(module)
            elif not self._is_ours(module):
                raise ValueError(
                    f"{site.path!r} is patched already, as a part of the model that was given to patch() by itself: "
                    "unpatch() its Runtime first"
                )
            wearing.setdefault(module, {})[site.side] = position
        for module in modules.values():
            if self._is_ours(module) and module not in wearing:
                unwrap(module)
        for module, positions in wearing.items():
            for side in _SIDES:
                place(module, side, positions.get(side))
        if self._routing.backend == "triton":
            pair_layers(modules, (site.path for site in sites))

    def check(self) -> None:
        """Raises RuntimeError where other code has changed a drop-in's class, so that it cannot be given back."""
        for path, module in self._model.named_modules():
            if self._is_ours(module) and is_altered(module):
                raise RuntimeError(
                    f"module {path!r} is a {type(module).__name__} now, which other code made of ia3rt's "
                    f"{type(module).__base__.__name__}: undo that first"  # type: ignore[union-attr]
                )

    def _is_ours(self, module: nn.Module) -> bool:
        return isinstance(module, Wearer) and module.ia3_routing is self._routing
