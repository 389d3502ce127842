"""Which sites an adapter's vectors are for: those that the model has, and new ones that the adapter brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ia3rt import ops
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.keys import path_of_key
from ia3rt.adapters.site import Site, SiteKey
from ia3rt.modules.own_modules import OwnModules
from ia3rt.modules.sites import Targets, find_sites, shared_modules, site_of
from ia3rt.modules.wearer import computing_device
from ia3rt.routing.route import Backend


class AdapterSites:
    """The sites of one model, as adapters name them.

    Args:
        model: the model.
        bank: its sites so far.
        targets: what adapters are held to.
        backend: what applies the vectors.
        own: adapters' own modules, in whose places the model's are looked at.
    """

    def __init__(self, model: nn.Module, bank: Bank, targets: Targets, backend: Backend, own: OwnModules) -> None:
        self._model, self._bank, self._targets, self._backend, self._own = model, bank, targets, backend, own
        self._shared = shared_modules(model)

    def site(self, name: str, key: SiteKey) -> Site:
        """The site that an adapter's vector is for.

        Args:
            name: the adapter's.
            key: the path of a module, and a side.

        Raises:
            ValueError: no vector can act there, or none of this adapter's.
        """
        self._check_unshared(name, key[0], key[0])
        if key in self._bank.sites:
            self._check_unshared(name, key[0], self._bank.sites[key].module)
            return self._bank.sites[key]
        path, side = key
        if side not in ("in", "out"):
            raise ValueError(f"adapter {name!r} has a vector at side {side!r} of {path!r}: sides are 'in' and 'out'")
        try:
            with self._own.lifted():
                modules = dict(self._model.named_modules())
                site = site_of(modules, path, side)
        except ValueError as error:
            meant = path_of_key(path)
            told = f". {path!r} is a key of PEFT's files: name the module, {meant!r}, or load_adapter() the files"
            raise ValueError(
                f"adapter {name!r} does not fit: {error}{told if path not in modules and meant in modules else ''}"
            ) from None
        self._check_unshared(name, path, site.module)
        self._targets.check(self._model, site, name)
        self._check_worn_by(name, site)
        return site

    def key(self, name: str, key: str | tuple[str, str]) -> SiteKey:
        """A path and a side; of a path alone, the one side where the model has a site there.

        Raises:
            ValueError: it has none or two, or no such module, or that is no key.
        """
        if not isinstance(key, str):
            if not isinstance(key, tuple) or [type(part) for part in key] != [str, str]:
                raise ValueError(
                    f"adapter {name!r} has a vector at {key!r}: name its place by a module's path, or by (path, 'in') "
                    "or (path, 'out')"
                )
            return cast("SiteKey", key)  # `site` looks at the side
        here = [site for site in self._bank.sites.values() if site.path == key]
        if len(here) == 1:
            return here[0].key
        if not here and key not in dict(self._model.named_modules()):
            self.site(name, (key, "out"))  # says that there is no such module
        raise ValueError(
            f"adapter {name!r}: say at which side of {key!r} its vector acts, with the key ({key!r}, 'in') or "
            f"({key!r}, 'out')"
        )

    def of_config(self, config: Mapping[str, Any]) -> list[Site]:
        """Those that an adapter_config.json names; none where it names none."""
        names = (config.get(each) for each in ("target_modules", "feedforward_modules", "exclude_modules"))
        targets = Targets(*names)
        with self._own.lifted():
            return find_sites(self._model, *targets) if targets.target_modules else []

    def _check_worn_by(self, name: str, site: Site) -> None:
        """Raises ValueError where what applies the vectors cannot do it where a new site lies."""
        device = computing_device(self._model.get_submodule(site.module))
        if device.type == "meta" and not all(each.type == "meta" for each in self._bank.devices.values()):
            raise ValueError(
                f"adapter {name!r} acts at {site}, whose weights are on the meta device, and no hook of accelerate's "
                "brings them elsewhere: load them first"
            )
        runs = device.type == "meta" or ops.backend(torch.empty(0, device=device)) == "triton"
        if self._backend == "triton" and not runs:
            raise ValueError(
                f"adapter {name!r} acts at {site}, which lies on {device}, where the triton backend does not run: "
                "patch(model, backend='torch')"
            )

    def _check_unshared(self, name: str, path: str, module: str) -> None:
        if module in self._shared:
            raise ValueError(
                f"adapter {name!r} has a vector at {path!r}, which is one module at {self._shared[module]}: in PEFT "
                "it would act at one of these, and here at all. Give each a module of its own (copy.deepcopy)"
            )
