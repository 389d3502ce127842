"""The Runtime: the adapters of one patched model, under the names that PEFT's users know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.checkpoint import read_checkpoint, write_checkpoint
from ia3rt.adapters.mix import BASE, CombinationType, Mix, MixLike
from ia3rt.adapters.site import ModuleNames, Site, SiteKey, name_matches
from ia3rt.modules import brought
from ia3rt.modules.brought import Brought
from ia3rt.modules.chosen import check_route
from ia3rt.modules.merge import MergedWeights, merge
from ia3rt.modules.own_modules import OwnModules
from ia3rt.modules.pair import pair_layers
from ia3rt.modules.sites import site_of
from ia3rt.modules.wearer import Wearer, place, unwrap, wrap
from ia3rt.modules.wearers import wearer_of
from ia3rt.routing import generation
from ia3rt.routing.composed import composed_vectors
from ia3rt.routing.route import Backend, Route, Routing
from ia3rt.routing.training import TrainedAdapters

Vectors: TypeAlias = "Mapping[str, Tensor] | Mapping[SiteKey, Tensor]"


class Runtime:
    """Loads, switches, combines and routes the IA³ adapters of one model. Made by `ia3rt.patch`.

    One forward at a time: what the rows wear is state of the model, as in PEFT.

    Attributes:
        model: the patched model. It is used as before; its weights are never touched, except by `merge_adapter`.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        backend: Backend,
        excluded: ModuleNames,
        extends: bool,
        fuses_gate_up: bool,
    ) -> None:
        # `extends`: whether adapters may add sites, except at `excluded` modules.
        self.model = model
        self._bank = bank
        self._excluded = excluded
        self._extends = extends
        self._routing = Routing(bank, backend, fuses_gate_up)
        self._own = OwnModules(model, self._routing)
        self._merged: tuple[MergedWeights, Route] | None = None
        self._place_sites()
        self._routing.refresh()
        generation.install(model, self._routing)
        self._hooks: list[RemovableHandle] | None = [
            model.register_forward_pre_hook(self._routing.before_forward, with_kwargs=True),
            model.register_forward_hook(self._routing.after_forward),
        ]

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters, in the order of loading."""
        return list(self._bank.adapters)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that some row wears now; empty for the base model."""
        route = self._routing.route if self._merged is None else self._merged[1]
        return list(dict.fromkeys(name for mix in route.mixes for name in mix.mix.adapters))

    @property
    def sites(self) -> list[Site]:
        """Where vectors can act, in the order of the bank's columns."""
        return list(self._bank.sites.values())

    @property
    def backend(self) -> Backend:
        """What applies the vectors: `triton` or `torch`."""
        return self._routing.backend

    def load_adapter(
        self,
        path_or_hub_id: str | Path,
        adapter_name: str | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Loads an IA³ checkpoint of PEFT's or AdapterHub's. It is worn once `set_adapter` or `route` says so.

        Its own modules (modules_to_save, such as a classification head, and saved embeddings) are worn with its
        vectors. docs/files.md says what is loaded and what is refused.

        Args:
            path_or_hub_id: a folder, or a repository's id on the Hugging Face Hub.
            adapter_name: what to call it; the folder's or repository's last name where None.
            revision: the repository's branch, tag or commit.
            subfolder: the folder inside that holds the adapter.
            token: the Hub token.

        Returns:
            The adapter's name.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the name is taken, the checkpoint is damaged or of another kind, or it does not fit the model.
                Nothing has changed then.
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("load an adapter")
        name = adapter_name if adapter_name is not None else Path(subfolder or path_or_hub_id).resolve().name
        self._bank.check_name(name)
        checkpoint = read_checkpoint(path_or_hub_id, revision=revision, subfolder=subfolder, token=token)
        vectors = {self._site(name, key): vector for key, vector in checkpoint.vectors.items()}
        own = brought.of_file(self.model, name, checkpoint)
        self._add(name, vectors, checkpoint.config, own)
        return name

    def add_adapter(
        self,
        name: str,
        vectors: Vectors | None = None,
        config: Mapping[str, Any] | None = None,
        modules: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Adds an adapter from tensors, or a new one to train.

        Args:
            name: what to call it.
            vectors: by module path where that module has one site, else by (path, "in") or (path, "out"); each of
                the site's width, in any shape. Sites left out count as ones. None makes an adapter of ones at all
                sites: it changes nothing until it is trained.
            config: what `save_adapter` writes into its adapter_config.json besides the sites, such as task_type. Of the
                modules that its modules_to_save names, and of those that PEFT adds for its task_type ("classifier" and
                "score" for SEQ_CLS and TOKEN_CLS, "qa_outputs" for QUESTION_ANS), the adapter gets its own, which begin
                as the model's.
            modules: by path, the state_dict() of a module that the adapter brings its own of.

        Raises:
            ValueError: the name is taken, a vector or a module does not fit the model or is not finite, or the model
                lacks a site or a module. Nothing has changed then.
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("add an adapter")
        self._bank.check_name(name)
        own = brought.to_train(self.model, name, modules or {}, config or {})
        if vectors is None:
            outside = [site for site in self.sites if own.owner(site.path) is None]
            vectors = {site.key: torch.ones(site.width) for site in outside}
        sited = [(self._site(name, self._key(name, key)), vector) for key, vector in vectors.items()]
        if len(dict(sited)) < len(sited):
            raise ValueError(f"adapter {name!r} has two vectors for one site: give each module once, or by side")
        self._add(name, dict(sited), dict(config or {}), own)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | None,
        adapter_name: str,
        combination_type: CombinationType = "product",
    ) -> None:
        """Adds the combination of loaded adapters as an adapter of its own, which lives on without them.

        Args:
            adapters: their names.
            weights: one a name for `linear` and `delta`; None for `product`.
            adapter_name: what to call the new one.
            combination_type: see `Mix`. PEFT's method of this name is `linear`; having adapters active at once is
                `product`.

        Raises:
            ValueError: as `Mix`; an adapter is unknown, or the name is taken.
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("combine adapters")
        if not adapters:
            raise ValueError("no adapters to combine: give at least one name")
        self._bank.check_name(adapter_name)
        weights = None if weights is None else tuple(weights)
        mix = self._bank.resolve(Mix(tuple(adapters), weights, combination_type))
        self._add(adapter_name, composed_vectors(self._bank, mix), {}, self._own.states(dict.fromkeys(mix.adapters)))

    def train_adapter(self, adapter_names: str | Sequence[str]) -> list[nn.Parameter]:
        """Makes what adapters have parameters of the model, and freezes everything else, until `end_training`.

        They are found by any optimizer over `model.parameters()`, by `transformers.Trainer`, and in the model's
        checkpoints: vectors as `ia3_out_<name>` and `ia3_in_<name>` of the modules where they act, an adapter's own
        modules as `ia3_own_<name>_…` of the model's. Saved embeddings are not trained, as in PEFT. All rows wear the
        adapters' product, unless the rows wear one of them already; `set_adapter` and `route` go on as before, and
        other adapters in a mix stay as they are.

        Args:
            adapter_names: loaded adapters, or new ones (`add_adapter(name)`).

        Returns:
            The parameters: the vectors, float32 [width] each, and those of the adapters' own modules.

        Raises:
            ValueError: an adapter is unknown, no row wears one and they cannot be combined, the bank's dtype is not
                float32, or a name is in the way.
            RuntimeError: adapters are trained already, or the model is merged or no longer patched.
        """
        self._check_open("train adapters")
        if self._routing.trained is not None:
            raise RuntimeError("adapters are trained already: call end_training() first")
        if not adapter_names:
            raise ValueError("no adapters to train: give at least one name")
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        adapters = [self._bank.resolve(Mix((name,))).adapters[0] for name in names]
        route = self._routing.route
        if not any(adapter in mix.adapters for mix in route.mixes for adapter in adapters):
            route = Route((self._bank.resolve(Mix(names)),))
        trained = TrainedAdapters(self.model, self._bank, adapters)
        try:
            own = self._own.train(trained.adapters)
        except ValueError:
            trained.end()
            raise
        self._routing.trained = trained
        self._routing.wear(route)
        return [*trained.parameters, *own]

    def end_training(self) -> None:
        """Ends what `train_adapter` began: the adapters keep what they learned, and the model's parameters are its own.

        Raises:
            RuntimeError: no adapters are trained.
        """
        if self._routing.trained is None:
            raise RuntimeError("no adapters are trained: there is nothing to end")
        self._own.end_training()
        self._routing.trained.end()
        self._routing.trained = None
        self._routing.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. Rows that wear it, alone or in a mix, wear the base model then, with a warning.

        Raises:
            ValueError: it is unknown, or is trained.
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("delete an adapter")
        (adapter,) = self._bank.resolve(Mix((adapter_name,))).adapters
        if self._routing.trained is not None and adapter in self._routing.trained.adapters:
            raise ValueError(f"adapter {adapter_name!r} is trained: call end_training() first")
        self._routing.drop(self._bank.remove(adapter_name))
        self._own.drop(adapter)

    def save_adapter(self, adapter_name: str, path: str | Path) -> None:
        """Writes an adapter as a PEFT checkpoint, which PEFT loads too.

        Args:
            adapter_name: a loaded adapter.
            path: the folder, made where it is missing.

        Raises:
            ValueError: it is unknown, or wears an input and an output vector on one module.
        """
        (adapter,) = self._bank.resolve(Mix((adapter_name,))).adapters
        base = getattr(getattr(self.model, "config", None), "name_or_path", "") or None
        config = {"base_model_name_or_path": base, "task_type": None, **adapter.config}
        paths = [path for path, _ in self.model.named_modules()]
        own = self._own.states((adapter,))
        write_checkpoint(path, self._bank.vectors(adapter), paths, config, own.states, own.embeddings)

    def set_adapter(self, adapter_name: MixLike) -> None:
        """Makes all rows of every batch wear one mix, until the next `set_adapter` or `route`.

        Args:
            adapter_name: a name, [names] for their product, {name: weight} for their weighted sum, a Mix, or None for
                the base model.

        Raises:
            ValueError: an adapter is unknown, or the mix is not a valid one.
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("switch adapters")
        self._routing.wear(Route((self._bank.resolve(Mix.of(adapter_name)),)))

    def route(self, mixes: Sequence[MixLike], index: Tensor | None = None) -> AbstractContextManager[None]:
        """Makes each row, or each token, wear a mix of its own.

        Takes effect at once; used in a `with`, what was worn before comes back at its end. Within `generate`, one row
        stands for a prompt, however many beams or sequences it is expanded to.

        Args:
            mixes: one a row of the batch: a name, None for the base model, a list for a product, {name: weight} for a
                weighted sum, or a Mix. With `index`, the mixes that it points to.
            index: integer [batch] or [batch, tokens]: which of `mixes` each row or token wears. Tokens are counted
                with their padding; what a row generates wears the mix of its last token.

        Raises:
            ValueError: an adapter is unknown, a mix or the index is not valid, rows of an adapter act inside the
                experts of a mixture, where rows are no longer the batch's, or tokens of a row would go through
                different modules of their adapters', or rows through different saved embeddings. A route
                whose rows are not the batch's is an error of the forward, before anything runs.
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("route rows")
        if isinstance(mixes, (str, Mapping, Mix)) or mixes is None:
            raise ValueError(f"route takes a list with one mix for each row, got {mixes!r}; set_adapter takes one mix")
        resolved = [self._bank.resolve(Mix.of(spec)) for spec in mixes]
        if not resolved:
            raise ValueError("route needs at least one row")
        for mix in resolved:
            for adapter in mix.adapters:
                site = adapter.site_in_experts
                if site is not None:
                    raise ValueError(
                        f"adapter {adapter.name!r} acts at {site}, inside a mixture's experts, where the rows of the "
                        "batch are mixed up: it can be worn by all rows (set_adapter), not by some"
                    )
        route = _indexed(Route.by_row(resolved), len(resolved), index)
        check_route(route)
        before = self._routing.route
        self._routing.wear(route)
        return self._restoring(before)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which all rows wear the base model; what was worn before comes back at its end.

        Raises:
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("disable adapters")
        before = self._routing.route
        self._routing.wear(Route((self._bank.resolve(BASE),)))
        with self._restoring(before):
            yield

    def merge_adapter(self, adapter_names: MixLike = None) -> None:
        """Writes a mix into the model's weights, to export it; adapters cannot change until `unmerge_adapter`.

        Vectors are multiplied in, and an adapter's own modules replace the model's.

        Args:
            adapter_names: what to merge; None merges what all rows wear now.

        Raises:
            ValueError: rows wear different mixes, or a weight is quantised, shared, or would overflow.
            RuntimeError: the model is merged already, its adapters are trained, or it is no longer patched.
        """
        self._check_open("merge")
        if self._routing.trained is not None:
            raise RuntimeError("cannot merge while adapters are trained: call end_training() first")
        route = self._routing.route
        if adapter_names is None and route.index is not None:
            raise ValueError("rows wear different mixes: set_adapter() the one to merge, or name it")
        mix = route.mixes[0] if adapter_names is None else self._bank.resolve(Mix.of(adapter_names))
        with self._own.lifted():
            merged = merge(self.model, self._bank, mix)
            try:
                self._own.merge(dict.fromkeys(mix.adapters), merged)
            except BaseException:
                merged.unmerge()
                raise
        self._merged = merged, route
        self._routing.wear(Route((self._bank.resolve(BASE),)))

    def unmerge_adapter(self) -> None:
        """Puts the weights back bit for bit, and what the rows wore before the merge.

        Raises:
            RuntimeError: the model is not merged.
        """
        if self._merged is None:
            raise RuntimeError("the model is not merged: there is nothing to unmerge")
        (weights, route), self._merged = self._merged, None
        weights.unmerge()
        self._routing.restore(route)

    def unpatch(self) -> nn.Module:
        """Makes the model what it was before `patch`, bit for bit, and returns it. The runtime is of no use then.

        Raises:
            RuntimeError: it was unpatched already.
        """
        if self._hooks is None:
            raise RuntimeError("the model is not patched any more: call ia3rt.patch(model) again")
        if self._merged is not None:
            self.unmerge_adapter()
        if self._routing.trained is not None:
            self.end_training()
        self._own.end()
        for module in self.model.modules():
            if isinstance(module, Wearer):
                unwrap(module)
        generation.uninstall(self.model)
        for hook in self._hooks:
            hook.remove()
        self._hooks = None
        return self.model

    def __repr__(self) -> str:
        """The runtime in a line."""
        worn = ", ".join(str(mix.mix) for mix in self._routing.route.mixes)
        return (
            f"Runtime({type(self.model).__name__}, {self.backend} backend, {len(self.sites)} sites, "
            f"adapters={self.adapters}, worn: {worn})"
        )

    def _check_open(self, what: str) -> None:
        if self._hooks is None:
            raise RuntimeError(f"cannot {what}: the model is not patched any more; call ia3rt.patch(model) again")
        if self._merged is not None:
            raise RuntimeError(f"cannot {what} while adapters are merged: call unmerge_adapter() first")

    def _add(self, name: str, vectors: Mapping[Site, Tensor], config: dict[str, Any], own: Brought) -> None:
        for site in vectors:
            owner = own.owner(site.path)
            if owner is not None:
                raise ValueError(
                    f"adapter {name!r} has a vector at {site} and its own module {owner!r} there, which wears none: "
                    "leave one of them out"
                )
        built = self._own.build(name, own)
        table = self._bank.table
        config = brought.with_names(config, own)
        adapter = self._bank.add(name, vectors, config, frozenset(built), frozenset(own.embeddings))
        if self._bank.table is not table:
            with self._own.lifted():
                self._place_sites()
            self._tie()
            self._routing.refresh()
        self._own.keep(adapter, built)

    def _place_sites(self) -> None:
        modules = dict(self.model.named_modules())
        for position, site in enumerate(self._bank.sites.values()):
            module, mixin = wearer_of(modules, site, self.backend)
            if not isinstance(module, Wearer):
                wrap(module, mixin, self._routing, self._follow)
                self._routing.composes |= not mixin.is_fused(module)
            place(module, site.side, position)
        if self.backend == "triton":
            pair_layers(modules, (site.path for site in self.sites))

    def _follow(self, device: torch.device) -> None:
        if device != self._bank.table.device:
            self._bank.to(device)
            self._routing.refresh()
        self._tie()

    def _tie(self) -> None:
        if self._routing.trained is not None:
            self._routing.trained.tie()

    def _key(self, name: str, key: str | SiteKey) -> SiteKey:
        if not isinstance(key, str):
            return key
        here = [site for site in self.sites if site.path == key]
        if len(here) == 1:
            return here[0].key
        raise ValueError(
            f"adapter {name!r}: say at which side of {key!r} its vector acts, with the key ({key!r}, 'in') or "
            f"({key!r}, 'out')"
        )

    def _site(self, name: str, key: SiteKey) -> Site:
        if key in self._bank.sites:
            return self._bank.sites[key]
        path, side = key
        if side not in ("in", "out"):
            raise ValueError(f"adapter {name!r} has a vector at side {side!r} of {path!r}: sides are 'in' and 'out'")
        try:
            with self._own.lifted():
                site = site_of(dict(self.model.named_modules()), path, side)
        except ValueError as error:
            raise ValueError(f"adapter {name!r} does not fit: {error}") from None
        if not self._extends:
            raise ValueError(f"adapter {name!r} acts at {site}, which target_modules left out: add it to patch()'s")
        if name_matches(path, self._excluded):
            raise ValueError(f"adapter {name!r} acts at {site}, which patch() was told to exclude")
        return site

    @contextmanager
    def _restoring(self, before: Route) -> Iterator[None]:
        try:
            yield
        finally:
            if self._merged is not None:  # within the `with`: what comes back, comes back at the unmerge
                self._merged = self._merged[0], before
            elif self._hooks is not None:
                self._routing.restore(before)


def _indexed(route: Route, mixes: int, index: Tensor | None) -> Route:
    if index is None:
        return route
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dim() not in (1, 2) or not index.numel():
        raise ValueError("index must be an integer tensor of shape [batch] or [batch, tokens]")
    if index.min() < 0 or index.max() >= mixes:
        raise ValueError(f"index points outside of the {mixes} mixes: it must lie in 0 … {mixes - 1}")
    assert route.index is not None
    return Route(route.mixes, route.index[index.cpu().long()])
