"""Adapters in training: their vectors are parameters of the model, which live in the bank's rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ia3rt.adapters.bank import Adapter, Bank, ResolvedMix
from ia3rt.adapters.site import Site


class TrainedAdapters:
    """The adapters of one model that are trained, while all else in it is frozen.

    A parameter is a view of its adapter's row of the bank, so what an optimizer writes is what the next forward wears.
    It is registered at the module where it acts, so that optimizers, `Trainer` and checkpoints find it.

    Attributes:
        adapters: which are trained.
    """

    def __init__(self, model: nn.Module, bank: Bank, adapters: Iterable[Adapter]) -> None:
        self.adapters = frozenset(adapters)
        self._bank = bank
        self._modules = dict(model.named_modules())
        self._parameters: dict[int, dict[Site, nn.Parameter]] = {}
        self._frozen: list[nn.Parameter] = []
        self._check()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)
        for adapter in sorted(self.adapters, key=lambda adapter: adapter.row):
            views = bank.vectors(adapter).items()
            self._parameters[adapter.row] = {site: nn.Parameter(view) for site, view in views}
            for site, parameter in self._parameters[adapter.row].items():
                self._modules[site.path].register_parameter(_attribute(site, adapter), parameter)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The vectors, float32 [width] each."""
        return [parameter for by_site in self._parameters.values() for parameter in by_site.values()]

    def are_worn(self, mixes: Iterable[ResolvedMix]) -> bool:
        """Whether a gradient of these mixes reaches a trained vector."""
        return any(not self.adapters.isdisjoint(mix.adapters) for mix in mixes)

    def rows(self, used: Sequence[int]) -> Tensor:
        """These rows of the bank, [rows, total_width]; gradients of it reach the parameters."""
        return torch.stack([self._row(row) for row in used])

    def tie(self) -> None:
        """Makes the parameters views of the bank again, after it was moved or the model was cast."""
        for adapter in self.adapters:
            for site, view in self._bank.vectors(adapter).items():
                parameter = self._parameters[adapter.row][site]
                if parameter.data_ptr() != view.data_ptr():
                    parameter.data = view

    def end(self) -> None:
        """Unregisters the parameters, and gives the model's own their `requires_grad` back."""
        for adapter in self.adapters:
            for site in self._parameters[adapter.row]:
                delattr(self._modules[site.path], _attribute(site, adapter))
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def _row(self, row: int) -> Tensor:
        if row not in self._parameters:
            return self._bank.table[row]
        by_site = self._parameters[row]
        columns = torch.split(self._bank.table[row], self._bank.widths)
        sited = zip(self._bank.sites.values(), columns, strict=True)
        return torch.cat([by_site.get(site, ones) for site, ones in sited])

    def _check(self) -> None:
        if self._bank.table.dtype != torch.float32:
            raise ValueError(
                f"training needs float32 vectors: patch(dtype=torch.float32), not {self._bank.table.dtype}"
            )
        seen: dict[tuple[str, str], str] = {}
        for adapter in self.adapters:
            for site in adapter.sites:
                key = site.path, _attribute(site, adapter)
                if key in seen or hasattr(self._modules[site.path], key[1]):
                    raise ValueError(
                        f"adapter {adapter.name!r} cannot be trained: {site.path!r} has a {key[1]!r} already; "
                        "give the adapter another name"
                    )
                seen[key] = adapter.name


def _attribute(site: Site, adapter: Adapter) -> str:
    """The parameter's name in its module; names of parameters have no dots."""
    return f"ia3_{site.side}_{adapter.name.replace('.', '_')}"
