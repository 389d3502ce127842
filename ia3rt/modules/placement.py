"""Where the adapters of one patched model act: its modules made drop-ins, and the vectors where these compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.outside_modes import outside_modes
from ia3rt.adapters.site import Site
from ia3rt.modules import brought
from ia3rt.modules.alone import alone
from ia3rt.modules.brought import Brought
from ia3rt.modules.drop_ins import DropIns
from ia3rt.modules.own_modules import OwnModules
from ia3rt.modules.wearer import computing_device
from ia3rt.routing import generation, hooks
from ia3rt.routing.routing import Routing


class Placement:
    """Makes a model one that wears what the bank has, and gives it back.

    Args:
        model: the model.
        bank: its adapters' vectors, and the sites where they act.
        routing: what its rows wear.

    Attributes:
        drop_ins: the modules that apply the bank's sites.
        own: the modules that adapters bring.
        is_installed: whether the model is patched.
    """

    def __init__(self, model: nn.Module, bank: Bank, routing: Routing) -> None:
        self._model = model
        self._bank = bank
        self._routing = routing
        self.drop_ins = DropIns(model, routing, self._follow)
        self.own = OwnModules(model, routing)
        self._placed: Mapping[Any, Site] | None = None  # the bank's, as they were when drop-ins were made of them
        self._hooks: list[RemovableHandle] = []
        self.is_installed = False
        routing.settle = self._settle
        bank.where = self._where

    def install(self) -> None:
        """Makes the modules at the bank's sites drop-ins, and lets the model's forwards bind what is worn."""
        self.is_installed = True
        self.drop_ins.place(self._bank.sites.values())
        self._placed = self._bank.sites
        self.own.begin()
        self._routing.refresh()
        generation.install(self._model, self._routing)
        self._hooks = hooks.install(self._model, self._routing)

    def uninstall(self) -> None:
        """Gives the model's modules back."""
        self._routing.release()
        self.own.end()
        self.drop_ins.place(())
        generation.uninstall(self._model)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.is_installed = False

    def add(self, name: str, vectors: Mapping[Site, Tensor], config: dict[str, Any], own: Brought) -> None:
        """Adds an adapter: its vectors to the bank, its own modules beside the model's. Called with the lock.

        Args:
            name: what it is called.
            vectors: by site, where the model may have none yet.
            config: its adapter_config.json.
            own: the modules that it brings.

        Raises:
            ValueError: a vector or a module does not fit. Nothing has changed then.
        """
        self.drop_ins.check_in_place()
        for site in vectors:
            owner = own.owner(site.path)
            if owner is not None:
                raise ValueError(
                    f"adapter {name!r} has a vector at {site} and its own module {owner!r} there, which wears none: "
                    "leave one of them out"
                )
        built = self.own.build(name, own)
        config = brought.with_names(config, own)
        tables, grown = self._bank.tables, False
        try:
            with self._bank.all_or_nothing():
                adapter = self._bank.add(name, vectors, config, frozenset(built), frozenset(own.embeddings))
                grown = self._bank.tables is not tables
                if grown:
                    self.follow_bank()
                self.own.keep(adapter, built)
            self._routing.probing.forget()
        except BaseException:
            if grown:
                self.follow_bank()
            raise

    def follow_bank(self) -> None:
        """Lets the model wear what the bank's tables are now, which have grown. Called with the lock."""
        if self._placed is not self._bank.sites:  # not for a row more: forwards of other threads go on meanwhile
            self._placed = None
            with self.own.lifted():
                self.drop_ins.place(self._bank.sites.values())
            self._placed = self._bank.sites
        self._tie()
        self._routing.refresh()
        self._routing.leave_graphs()

    @alone
    def _follow(self, module: nn.Module) -> None:
        """Lets the vectors at a drop-in follow it, which may have been moved."""
        device = computing_device(module)
        are_together = False
        for position in (module.ia3_in, module.ia3_out):
            if isinstance(position, int):
                are_together = self._bank.moved(position, device)
        if are_together:
            self._settle()
        elif self._bank.is_settled:
            self._tie()

    def _where(self, site: Site) -> torch.device:
        layer = self.drop_ins.layers.get(site)
        return computing_device(self._model.get_submodule(site.module) if layer is None else layer)

    @alone
    @outside_modes
    def _settle(self) -> None:
        """Brings vectors, and what is worn, to where the layers are."""
        were_moved = not self._bank.is_settled
        were_elsewhere = self._bank.settle()
        if were_elsewhere:
            self.drop_ins.settle()
            self._routing.refresh()
            self._routing.rebind()
        if were_moved or were_elsewhere:
            self._tie()
        if were_elsewhere:
            self._routing.leave_graphs()  # last, as a warning may be an error

    def _tie(self) -> None:
        if self._routing.trained is not None:
            self._routing.trained.keep_float32()
