"""Begins and ends the training of a model's adapters: their vectors, and the modules that they bring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.fetched import Fetched
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.tiers import Tiers
from ia3rt.adapters.together import check_modules
from ia3rt.modules.own_modules import OwnModules
from ia3rt.modules.trainable import check_trainable
from ia3rt.routing.route import Route
from ia3rt.routing.routing import Routing
from ia3rt.routing.training import TrainedAdapters


class Training:
    """Of one model's adapters, some at a time. Its methods are called with the lock."""

    def __init__(self, model: nn.Module, bank: Bank, tiers: Tiers, routing: Routing, own: OwnModules) -> None:
        self._model, self._bank, self._tiers, self._routing, self._own = model, bank, tiers, routing, own

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained."""
        return self._routing.trained is not None

    def trains(self, adapter: Adapter) -> bool:
        """Whether this one is."""
        return self._routing.trained is not None and adapter in self._routing.trained.adapters

    def begin(self, names: tuple[str, ...], fetched: Fetched) -> list[nn.Parameter]:
        """Makes what adapters have parameters of the model, and freezes everything else.

        Args:
            names: the adapters'.
            fetched: those of them that are registered.

        Returns:
            The parameters: the vectors, and those of the adapters' own modules.

        Raises:
            ValueError: as `Runtime.train_adapter`. Nothing has changed then.
            RuntimeError: adapters are trained already.
        """
        if self.is_on:
            raise RuntimeError("adapters are trained already: call end_training() first")
        worn = {adapter for mix in self._routing.route.mixes for adapter in mix.adapters}

        def check(mixes: Sequence[tuple[Adapter, ...]]) -> None:
            adapters = [adapter for (adapter,) in mixes]
            if len({*adapters}) < len(adapters):
                raise ValueError(f"adapters to train are {list(names)}: name each once")
            check_trainable(self._model, adapters)
            self._own.check_names(adapters)
            if worn.isdisjoint(adapters):
                _check_product(names, adapters)

        resolved = self._tiers.resolve([Mix((name,)) for name in names], fetched, check)
        adapters = [mix.adapters[0] for mix in resolved]
        route = None if not worn.isdisjoint(adapters) else Route((self._bank.resolve(Mix(names)),))
        with torch.inference_mode(False):
            trained = TrainedAdapters(self._model, self._bank, adapters)
        try:
            own = self._own.train(trained.adapters)
        except ValueError:
            trained.end()
            raise
        for adapter in adapters:
            self._bank.adapters.keep(adapter.name)  # its files hold other numbers from now on
        self._routing.trained = trained
        if route is None:
            self._routing.refresh()
        else:
            self._routing.wear_everywhere(route)
        return [*trained.parameters, *own]

    def make_plain(self) -> None:
        """Takes off what other code computes parameters by that are trained, with the numbers that it gives."""
        if self._routing.trained is not None:
            self._own.make_plain()
            self._routing.trained.make_plain()

    def end(self) -> None:
        """Lets the adapters keep what they learned, and the model's parameters be its own; nothing where none are."""
        self.make_plain()
        if self._routing.trained is not None:
            self._own.end_training()
            self._routing.trained.end()
            self._routing.trained = None

    def sync(self) -> None:
        """Writes what was learned so far to the bank."""
        if self._routing.trained is not None:
            self._routing.trained.sync()


def _check_product(names: tuple[str, ...], adapters: Sequence[Adapter]) -> None:
    try:
        check_modules(adapters)
    except ValueError as error:
        raise ValueError(
            f"no row wears any of {list(names)}, and all rows would wear their product in training, which cannot be: "
            f"{error}. Let rows wear one of them first (set_adapter(), or train within route())"
        ) from None
