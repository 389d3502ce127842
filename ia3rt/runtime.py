"""The Runtime: the adapters of one patched model, under the names that PEFT's users know."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ia3rt.adapters.combining.combination import Combination, DerivedType
from ia3rt.adapters.combining.config import combined_config
from ia3rt.adapters.combining.ties import MajoritySignMethod
from ia3rt.adapters.contents import AdapterContents, Vectors
from ia3rt.adapters.fetched import NOTHING, Fetched
from ia3rt.adapters.given import check_mapping, check_tensors
from ia3rt.adapters.giving_back import active_in_peft, check_givable, give_back
from ia3rt.adapters.mix import BASE, CombinationType, Mix, MixLike
from ia3rt.adapters.mix_text import read_mix
from ia3rt.adapters.registry import AdapterSource, Registry
from ia3rt.adapters.resolved import ResolvedMix
from ia3rt.adapters.site import Site, SiteKey
from ia3rt.adapters.takeover import TakenOver
from ia3rt.adapters.tier_stats import TierStats
from ia3rt.adapters.tiers import Tiers
from ia3rt.modules import brought
from ia3rt.modules.adapter_sites import AdapterSites
from ia3rt.modules.alone import alone
from ia3rt.modules.brought import Brought
from ia3rt.modules.chosen import check_rows
from ia3rt.modules.merge import MergedWeights
from ia3rt.modules.placement import Placement
from ia3rt.modules.reading import Reading
from ia3rt.modules.sites import Targets
from ia3rt.modules.training import Training
from ia3rt.routing.combined import combined_vectors
from ia3rt.routing.entering import Entering
from ia3rt.routing.route import Backend, Route, check_images, check_index
from ia3rt.routing.routing import Routing
from ia3rt.routing.start import check_one_sequence, check_start
from ia3rt.routing.wearing import Wearing

_LARGEST = torch.finfo(torch.float32).max

VectorsLike: TypeAlias = "Mapping[str, Tensor] | Mapping[SiteKey, Tensor] | Mapping[tuple[str, str], Tensor]"


class Runtime:
    """Loads, switches, combines and routes the IA³ adapters of one model. Made by `ia3rt.patch`.

    What is worn is bound to a forward when it begins. `set_adapter` says it for all that have no route of their own;
    `route` and `disable_adapter` concern the thread, or the task of an event loop, that calls them, so that several
    threads may run forwards of one model at once.

    Attributes:
        model: the patched model. It is used as before; its weights are never touched, except by `merge_adapter`.
        is_unclaimed: whether it came to be by a deep copy of a patched model, and `patch` has not given it to anyone.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        backend: Backend,
        targets: Targets,
        fuses_gate_up: bool,
        taken: TakenOver | None = None,
        host_bytes: int = 0,
    ) -> None:
        self.model = model
        self._bank = bank
        self._taken = taken
        self._routing = Routing(bank, backend, fuses_gate_up)
        self._routing.attach(model)
        self._placement = Placement(model, bank, self._routing)
        self._own = self._placement.own
        self._sites = AdapterSites(model, bank, targets, backend, self._own)
        self._reading = Reading(model, bank, self._sites, self._routing, self._placement.drop_ins.check_in_place)
        self._tiers = Tiers(bank, self._reading.row, self._placement.follow_bank, host_bytes)
        self._training = Training(model, bank, self._tiers, self._routing, self._own)
        self._merged: MergedWeights | None = None
        self.is_unclaimed = False
        try:
            self._install()
            if taken is not None:
                self._adopt(taken)
        except BaseException:
            self._uninstall()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The runtime of a copy of the model; unclaimed where it is the model that is copied, and not the runtime."""
        copied = Runtime.__new__(Runtime)
        is_unclaimed = id(self.model) in memo
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo), is_unclaimed=is_unclaimed)
        return copied

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters, in the order of loading, and of those registered that are resident now."""
        with self._routing.lock:
            return list(self._bank.adapters)

    @property
    def registered_adapters(self) -> list[str]:
        """The names that `register` made known, resident or not, without those that only a function knows."""
        with self._routing.lock:
            return self._tiers.names

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that some row wears now; empty for the base model."""
        mixes = self._routing.chosen.mixes
        return list(dict.fromkeys(name for mix in mixes for name in mix.mix.adapters))

    @property
    def sites(self) -> list[Site]:
        """Where vectors can act, in the order of the bank's columns."""
        return list(self._bank.sites.values())

    @property
    def backend(self) -> Backend:
        """What applies the vectors: `triton` or `torch`."""
        return self._routing.backend

    def get_adapter(self, adapter_name: str) -> AdapterContents:
        """An adapter's vectors and config, as they are now: a copy, which `add_adapter` of any runtime takes.

        Returns:
            Its `vectors`, [width] each by (path, "in") or (path, "out"), or by path alone where the module has one; of
            experts [experts, width], or [width] where all of them share one; its `config`; and its own `modules`, as
            `add_adapter` takes them.

        Raises:
            ValueError: it is unknown.
            RuntimeError: adapters are trained, and other code computes a parameter of theirs from others.
        """
        self._placement.drop_ins.check_in_place()
        return self._contents(adapter_name, self._fetch_named((adapter_name,)))

    @alone
    def _contents(self, name: str, fetched: Fetched = NOTHING) -> AdapterContents:
        (adapter,) = self._resolve(Mix((name,)), fetched).adapters
        self._training.sync()
        vectors = {
            site.key: (vector.view(site.experts, -1) if site.experts and site not in adapter.shared else vector)
            .detach()
            .clone()
            for site, vector in self._bank.distinct(adapter).items()
        }
        states = self._own.states((adapter,)).states
        own = {path: {each: x.detach().clone() for each, x in state.items()} for path, state in states.items()}
        return AdapterContents(name, Vectors(vectors), copy.deepcopy(adapter.config), own)

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
        self._check_name(name)
        checkpoint = read_checkpoint(path_or_hub_id, revision=revision, subfolder=subfolder, token=token)
        self._add_read(name, checkpoint)
        return name

    @alone
    def _add_read(self, name: str, checkpoint: Checkpoint) -> None:
        self._check_open("load an adapter")  # it may have been unpatched or merged since the files were opened
        vectors = self._reading.vectors(name, checkpoint)
        self._add(name, vectors, checkpoint.config, brought.of_file(self.model, name, checkpoint))

    @alone
    def add_adapter(
        self,
        name: str,
        vectors: VectorsLike | None = None,
        config: Mapping[str, Any] | None = None,
        modules: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Adds an adapter from tensors, or a new one to train.

        Args:
            name: what to call it.
            vectors: by module path where that module has one site, else by (path, "in") or (path, "out"); each of
                the site's width, in any shape; of experts [experts, width], or [width] for all alike. Sites left out
                count as ones. None makes an adapter of ones at all sites, or, where the model has none yet, at those
                that the config's target_modules and feedforward_modules name: it changes nothing until it is trained.
            config: what `save_adapter` writes into its adapter_config.json besides the sites, such as task_type. Of the
                modules that its modules_to_save names, and of those that PEFT adds for its task_type ("classifier" and
                "score" for SEQ_CLS and TOKEN_CLS, "qa_outputs" for QUESTION_ANS), the adapter gets its own, which begin
                as the model's.
            modules: by path, the state_dict() of a module that the adapter brings its own of. Where it is given, a name
                in modules_to_save that means nothing in the model is let be, as in PEFT.

        Raises:
            ValueError: the name is taken, a vector or a module does not fit the model or is not finite, a vector is not
                of a floating point dtype, or not ones outside of its site's slices, or the model lacks a site or a
                module. Nothing has changed then.
            TypeError: vectors or modules are no tensors, or the config is no mapping; nor then.
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("add an adapter")
        self._check_name(name)
        config = {} if config is None else config
        check_mapping(config, f"the config of adapter {name!r}", "values, as adapter_config.json holds them")
        own = brought.of_tensors(self.model, name, modules, config)
        if vectors is not None:
            check_tensors(vectors, f"the vectors of adapter {name!r}")
        else:
            sites = self.sites or self._sites.of_config(config)
            if not sites:
                raise ValueError(
                    f"adapter {name!r} has no place to act: {type(self.model).__name__} has no site yet. Give its "
                    "vectors, or name the modules in patch(target_modules=…) or in its config's target_modules"
                )
            outside = [site for site in sites if own.owner(site.path) is None]
            vectors = {site.key: torch.ones(site.width, dtype=torch.float32, device="cpu") for site in outside}
        here = self._sites
        sited = [(here.site(name, here.key(name, key)), vector) for key, vector in vectors.items()]
        if len(dict(sited)) < len(sited):
            raise ValueError(f"adapter {name!r} has two vectors for one site: give each module once, or by side")
        self._add(name, dict(sited), copy.deepcopy(dict(config)), own)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str] | Mapping[str, float],
        weights: Sequence[float] | None,
        adapter_name: str,
        combination_type: CombinationType | DerivedType = "product",
        *,
        density: float | None = None,
        majority_sign_method: MajoritySignMethod = "total",
        seed: int | None = None,
        normalize: bool = False,
        importances: Mapping[str, VectorsLike] | None = None,
    ) -> None:
        """Adds the combination of loaded adapters as an adapter of its own, which lives on without them.

        Its vectors are a few thousand numbers and are computed once, from what the adapters are now, those in training
        too. docs/composition.md has the formulas. An adapter's own modules (modules_to_save) come along as they are,
        and are not weighted: of each module one adapter may have its own.

        Args:
            adapters: their names; or {name: weight}, as `set_adapter` takes it, with None for `weights`.
            weights: one a name; None for `product`, for 0.85 each of `delta` of two or more, and for 1 each of those
                that are no `Mix`, but `slerp`, of which they are (1 - t, t).
            adapter_name: what to call the new one.
            combination_type: `product`, `linear` and `delta` as in `Mix`; `power`, `ties`, `dare_linear`, `dare_ties`,
                `magnitude_prune`, `max_abs`, `fisher`, `negate`, `analogy` and `slerp` as the functions of these names
                in ia3rt.adapters.combining; docs/combining.md says which keep the most. PEFT's method of this name is
                `linear`; having adapters active at once is `product`. What PEFT calls `cat` for LoRAs, a weighted sum
                of changes, is `delta` here.
            density: for `ties` (0.4 where None), `dare_linear`, `dare_ties` and `magnitude_prune`: the share of each
                vector's numbers that stays, in (0, 1].
            majority_sign_method: for `ties` and `dare_ties`: `total` or `frequency`.
            seed: for `dare_linear` and `dare_ties`; None is 0. It gives the same adapter on every machine.
            normalize: whether weights are divided by their sum first.
            importances: for `fisher`: by adapter, what `add_adapter` takes as its vectors, 0 or more each, at all of
                its sites.

        Raises:
            ValueError: as `Combination`; an adapter is unknown, or the name is taken; what cannot be combined, with the
                site. Nothing has changed then.
            TypeError: as `Combination`; or importances are no tensors.
            RuntimeError: the model is merged or no longer patched; or as `get_adapter`.
        """
        self._check_open("combine adapters")
        self._check_name(adapter_name)
        if importances is not None:
            check_mapping(importances, "importances", "vectors")
            for name, given in importances.items():
                check_tensors(given, f"the importances of adapter {name!r}")
        if isinstance(adapters, Mapping):
            if weights is not None:
                raise ValueError(f"adapters {dict(adapters)} have weights already: give weights=None")
            weights, adapters = list(adapters.values()), list(adapters)
        combination = Combination(adapters, weights, combination_type, density, majority_sign_method, seed, normalize)
        self._add_combined(combination, adapter_name, importances, self._fetch_named(combination.adapters))

    @alone
    def _add_combined(
        self,
        combination: Combination,
        adapter_name: str,
        importances: Mapping[str, VectorsLike] | None,
        fetched: Fetched,
    ) -> None:
        self._check_open("combine adapters")
        resolved = self._resolve(Mix(tuple(combination.adapters)), fetched)  # which keeps them resident
        self._training.sync()
        by_site = None
        if importances is not None:
            key = self._sites.key
            by_site = {n: {key(n, where): each for where, each in given.items()} for n, given in importances.items()}
        vectors = combined_vectors(self._bank, combination, by_site)
        config = combined_config((each.config, bool(each.modules - each.embeddings)) for each in resolved.adapters)
        self._add(adapter_name, vectors, config, self._own.states(dict.fromkeys(resolved.adapters)))

    def train_adapter(self, adapter_names: str | Sequence[str]) -> list[nn.Parameter]:
        """Makes what adapters have parameters of the model, and freezes everything else, until `end_training`.

        They are found by any optimizer over `model.parameters()`, by `transformers.Trainer`, and in the model's
        checkpoints: vectors as `ia3_out_<name>` and `ia3_in_<name>` of the modules where they act, an adapter's own
        modules as `ia3_own_<name>_…` of the model's. Saved embeddings are not trained, as in PEFT. All rows wear the
        adapters' product, unless rows wear one of them already, in whatever mix, as they have to where the product
        cannot be worn (heads of their own); `set_adapter` and `route` go on as before, and other adapters in a mix stay
        as they are.

        Each call makes new parameters, which `end_training` takes out of the model again. So an optimizer is of one
        `train_adapter` … `end_training`: kept for a later one it moves nothing, and says nothing, as its parameters
        get no gradients. Adapters that are trained in turns are trained together (`train_adapter(["a", "b"])`), and
        `set_adapter` or `route` says whose turn it is: what no row wears gets no gradient.

        Args:
            adapter_names: loaded adapters, or new ones (`add_adapter(name)`).

        Returns:
            The parameters: the vectors, float32 [width] each, or of the width of a site's slices where `patch` names
            them, and those of the adapters' own modules.

        Raises:
            ValueError: the model is tensor-parallel; an adapter is unknown, named twice, acts at an offloaded module or
                has modules of its own beside a model that FSDP splits; no row wears one and all rows cannot wear their
                product; or a name is in the way.
            RuntimeError: adapters are trained already, or the model is merged or no longer patched.
        """
        self._check_open("train adapters")
        if not adapter_names:
            raise ValueError("no adapters to train: give at least one name")
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        return self._train(names, self._fetch_named(names))

    @alone
    def _train(self, names: tuple[str, ...], fetched: Fetched) -> list[nn.Parameter]:
        self._check_open("train adapters")
        self._placement.drop_ins.check_in_place()
        return self._training.begin(names, fetched)

    @alone
    def end_training(self) -> None:
        """Ends what `train_adapter` began: the adapters keep what they learned, and the model's parameters are its own.

        An optimizer over the parameters that `train_adapter` gave ends with it.

        Raises:
            RuntimeError: no adapters are trained.
        """
        if not self._training.is_on:
            raise RuntimeError("no adapters are trained: there is nothing to end")
        self._training.end()
        self._routing.refresh()

    @alone
    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. Rows that wear it, alone or in a mix, wear the base model then, with a warning.

        Forwards that run, and routes that other threads or tasks have entered, go on with it to their ends.

        Raises:
            ValueError: it is unknown, or is trained.
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("delete an adapter")
        if self._tiers.is_registered(adapter_name) and adapter_name not in self._bank.adapters:
            self._tiers.forget(adapter_name)
            return
        (adapter,) = self._bank.resolve(Mix((adapter_name,))).adapters
        if self._training.trains(adapter):
            raise ValueError(f"adapter {adapter_name!r} is trained: call end_training() first")
        self._tiers.forget(adapter_name)
        was_worn = self._routing.drop(self._bank.adapters.remove(adapter_name))
        self._own.drop(adapter)
        if was_worn:  # last, as a warning may be an error
            warnings.warn(
                f"adapter {adapter_name!r} was active and is deleted: the rows that wore it wear the base model now",
                stacklevel=3,
            )

    def register(self, source: AdapterSource) -> list[str]:
        """Makes adapters known by name without loading them: each is brought in when something names it.

        `set_adapter`, `route` and all else that takes a name read it from its files, once, and keep it in the host's
        memory (`patch(host_memory=…)`) and the bank. Where the bank does not grow (`patch(capacity=…, grow=False)`)
        those used least recently make room, unless a forward or a route wears them. Files that change are noticed
        within a second, and when the adapter is brought in: whatever wears the old adapter goes on with it, what names
        it from then on wears the new one.

        Args:
            source: a folder that holds adapters' folders, by whose names they are known, with a warning where some lie
                one folder deeper; a mapping of names to folders; or a function that gives the folder of a name, or
                None, and is asked each time. Adapters with modules of their own, or at sites that the model has not
                got, have to be loaded.

        Returns:
            The names that are known now by it; none of a function.

        Raises:
            FileNotFoundError: there is no such folder, or no adapter in it.
            ValueError: a name is a loaded adapter's, or registered with another folder. Nothing has changed then.
            TypeError: it is no source.
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("register adapters")
        return self._register(source, Registry.read(source))

    @alone
    def _register(self, source: AdapterSource, found: dict[str, Path]) -> list[str]:
        self._check_open("register adapters")
        return self._tiers.register(source, found)

    def pin(self, adapter_name: str) -> None:
        """Brings a registered adapter in, and keeps it in the bank as it is until `unpin`, as CUDA graphs may need.

        One that was loaded stays anyway, until it is deleted.

        Raises:
            FileNotFoundError: its files are gone.
            ValueError: it is unknown or damaged, or the bank has no row for it.
            RuntimeError: the model is merged or no longer patched.
        """
        self._pin(adapter_name, self._tiers.fetch([adapter_name]))

    @alone
    def _pin(self, name: str, fetched: Fetched) -> None:
        self._check_open("pin an adapter")
        self._tiers.pin(name, fetched)

    @alone
    def unpin(self, adapter_name: str) -> None:
        """Lets a pinned adapter make room for others again.

        Raises:
            ValueError: it was not pinned.
        """
        self._tiers.unpin(adapter_name)

    def prefetch(self, adapter_names: str | Sequence[str]) -> Future[None]:
        """Brings registered adapters in beside what runs, so that they are there when they are named.

        A thread reads them; on CUDA they are copied in a stream of its own. What the bank has no room for stays in
        the host's memory.

        Returns:
            What is done when they are there; its `result()` raises what went wrong. Nothing needs to wait for it.

        Raises:
            ValueError: one is unknown.
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("prefetch adapters")
        return self._tiers.prefetch([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    @alone
    def stats(self) -> TierStats:
        """Hits, misses, evictions, bytes and load times of registered adapters, since `patch`."""
        return self._tiers.stats()

    def save_adapter(self, adapter_name: str, path: str | Path) -> None:
        """Writes an adapter as a PEFT checkpoint, which PEFT loads too.

        Args:
            adapter_name: a loaded adapter.
            path: the folder, made where it is missing.

        Raises:
            ValueError: it is unknown, or wears an input and an output vector on one module.
            RuntimeError: as `get_adapter`.
        """
        adapter, vectors, own = self._stored(adapter_name, self._fetch_named((adapter_name,)))
        base = getattr(getattr(self.model, "config", None), "name_or_path", "") or None
        config = {"base_model_name_or_path": base, "task_type": None, **adapter.config}
        paths = [path for path, _ in self.model.named_modules()]
        write_checkpoint(path, vectors, paths, config, own.states, own.embeddings)

    @alone
    def _stored(self, name: str, fetched: Fetched) -> tuple[Adapter, dict[Site, Tensor], Brought]:
        """An adapter, its vectors as they are now, and its own modules."""
        self._placement.drop_ins.check_in_place()
        (adapter,) = self._resolve(Mix((name,)), fetched).adapters
        self._training.sync()
        vectors = {site: vector.detach().clone() for site, vector in self._bank.distinct(adapter).items()}
        return adapter, vectors, self._own.states((adapter,))

    def set_adapter(self, adapter_name: MixLike) -> None:
        """Makes all rows of every batch wear one mix, until the next `set_adapter` or `route`.

        Args:
            adapter_name: a name, [names] for their product, {name: weight} for their weighted sum, a Mix, or None for
                the base model; or what a request brings: text, `a*b`, `mix:a*0.7+b*0.3` or `delta:a*0.5`, and plain
                data, {"adapters": ["a", "b"], "weights": [0.7, 0.3], "combination_type": "linear"}.

        Raises:
            ValueError: an adapter is unknown, or the mix is not a valid one.
            RuntimeError: the model is merged or no longer patched.
        """
        mixes = (self._mix(adapter_name),)
        self._wear_everywhere(mixes, self._fetch(mixes))

    def route(
        self,
        mixes: Sequence[MixLike],
        index: Tensor | None = None,
        *,
        images: Sequence[int] | None = None,
        start: int | Sequence[int | None] | None = None,
    ) -> AbstractContextManager[None]:
        """Makes each row, or each token, wear a mix of its own, in the thread or task that calls it.

        Takes effect at once, and is entered where it is called: used in a `with`, what was worn before comes back at
        its end, and else it lasts until the next `route` or `set_adapter` of this thread. Within `generate`, one row
        stands for a prompt, however many beams or sequences it is expanded to.

        Where a layer has its rows is seen in the first forward of each kind, which takes about three times as long.

        Args:
            mixes: one a row of the batch: a name, None for the base model, a list for a product, {name: weight} for a
                weighted sum, a Mix, or text or plain data as in `set_adapter`. With `index`, the mixes that it points
                to.
            index: integer [batch] or [batch, tokens]: which of `mixes` each row or token wears. Tokens are counted
                with their padding; what a row generates wears the mix of its last token.
            images: the row that each image of the batch belongs to, for vectors in the part of the model that sees.
                None where the text says so, by its image tokens.
            start: the position of the first token of each row that wears its mix, or one for all rows; those before it
                wear the base model, so that what a key-value cache holds of them serves all adapters. Positions are
                those of `input_ids` (of `inputs_embeds`), from 0 and with their padding; tokens that a cache holds
                count, and so do those that are generated. None and 0: all tokens wear it.

        Raises:
            ValueError: an adapter is unknown, a mix, the index, images or start are not valid, an adapter acts at
                experts that are modules of their own, where rows are no longer the batch's, or tokens of a row would go
                through different modules of their adapters', or rows through different saved embeddings; or a start
                is given for an encoder-decoder model, with an index of tokens or with images, or where a CUDA graph
                of so many rows was captured. A route whose rows are not the batch's is an error of the forward,
                before anything runs, and so is a start of which it is not known at which tokens a forward is; a layer
                where it is not known whose each element of its input is, is one when it is reached.
            RuntimeError: the model is merged or no longer patched; or, when it is entered, something else is worn by
                now, or it was entered before.
        """
        self._check_open("route rows")
        if isinstance(mixes, (str, Mapping, Mix, Set)) or mixes is None:
            raise ValueError(f"route takes a list with one mix for each row, got {mixes!r}; set_adapter takes one mix")
        read = [self._mix(spec) for spec in mixes]
        if not read:
            raise ValueError("route needs at least one row")
        if index is not None:
            check_index(index, len(read))
        rows = len(read) if index is None else len(index)
        image_rows = check_images(images, rows)
        starts = None
        if start is not None:
            check_one_sequence(self.model)
            starts = check_start(start, rows, index is not None and index.dim() == 2, image_rows)
        before = self._wear_here(read, self._fetch(read), index, image_rows, starts)
        return Entering(self._routing, before, lambda: self._placement.is_installed)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which all rows wear the base model; what was worn before comes back at its end.

        Raises:
            RuntimeError: the model is merged or no longer patched.
        """
        self._check_open("disable adapters")
        before = self._routing.wear_here(Route((self._bank.resolve(BASE),)))
        within = self._routing.hold()
        try:
            yield
        finally:
            if self._placement.is_installed:
                self._routing.wear_again(before, within)

    def merge_adapter(self, adapter_names: MixLike = None) -> None:
        """Writes a mix into the model's weights, to export it; adapters cannot change until `unmerge_adapter`.

        Vectors are multiplied in, and an adapter's own modules replace the model's.

        While merged, a further call multiplies a further mix in. As in PEFT, an adapter that is merged already is not
        merged again, with a warning.

        Args:
            adapter_names: what to merge; None merges what all rows wear now, or wore before the first merge.

        Raises:
            ValueError: rows wear different mixes; nothing is named, merged or worn; or a weight is quantised,
                offloaded, shared, or would overflow. Nothing has changed then.
            RuntimeError: adapters are trained, or the model is no longer patched; or other code has written merged
                weights, as `unmerge_adapter`.
        """
        self._check_open("merge", while_merged=True)
        mix = None if adapter_names is None else self._mix(adapter_names)
        self._merge(mix, NOTHING if mix is None else self._fetch((mix,)))

    @alone
    def _merge(self, named: Mix | None, fetched: Fetched) -> None:
        self._check_open("merge", while_merged=True)
        if self._training.is_on:
            raise RuntimeError("cannot merge while adapters are trained: call end_training() first")
        weights = self._merged or MergedWeights(self.model, self._bank, self._own.merge)
        route = self._routing.chosen
        if named is None and route.index is not None:
            raise ValueError("rows wear different mixes: set_adapter() the one to merge, or name it")
        mix = route.mixes[0].mix if named is None else named
        if not mix.adapters and self._merged is None:
            raise ValueError("all rows wear the base model: set_adapter() the adapter to merge, or name it")
        mix = weights.without_merged(mix)
        resolved = route.mixes[0].without_others(mix) if named is None else self._resolve(mix, fetched)
        self._placement.drop_ins.check_alone()
        with self._own.lifted():
            weights.merge(resolved)
        if self._merged is None:
            self._merged = weights
            self._routing.cover()

    @alone
    def unmerge_adapter(self) -> None:
        """Puts the weights back bit for bit, and what the rows wore before the merge.

        The model may have been moved or cast meanwhile, but what loads or trains its weights comes after.

        Raises:
            RuntimeError: the model is not merged; or other code has written merged weights since, or put others in
                their place. Nothing has changed then, and `merge_and_unload()` keeps what is there.
        """
        if self._merged is None:
            raise RuntimeError("the model is not merged: there is nothing to unmerge")
        self._merged.unmerge()
        self._merged = None
        self._routing.uncover()

    def merge_and_unload(self, adapter_names: MixLike = None) -> nn.Module:
        """Multiplies a mix into the model's weights for good, and returns the model without ia3rt and without PEFT.

        The runtime is of no use then, and neither is a PeftModel that was patched.

        Args:
            adapter_names: what to merge, also after `merge_adapter`; None merges what all rows wear now, or nothing
                more than what is merged already: then the model stays as it is.

        Raises:
            ValueError: as `merge_adapter`.
            RuntimeError: as `merge_adapter`, where there is something to merge.
        """
        self._check_open("merge", while_merged=True)
        mix = None if adapter_names is None else self._mix(adapter_names)
        return self._merge_and_unload(mix, NOTHING if mix is None else self._fetch((mix,)))

    @alone
    def _merge_and_unload(self, named: Mix | None, fetched: Fetched) -> nn.Module:
        self._check_open("merge", while_merged=True)
        if named is not None or self._merged is None:
            self._merge(named, fetched)
        self._uninstall()
        self._merged = None
        if self._taken is not None:
            self._taken.release()
        return self.model

    @alone
    def unpatch(self) -> nn.Module:
        """Gives back what `patch` was given, bit for bit, and returns it. The runtime is of no use then.

        A PeftModel, or a model that transformers had loaded adapters into, has its adapters again as they are now:
        with the values they have, without those that were deleted, with those that were added, and with those active
        that all rows wear.

        Raises:
            ValueError: PEFT cannot hold what there is now: rows wear different mixes or a weighted one, or an adapter
                acts at both sides of a module. Nothing has changed then.
            RuntimeError: it was unpatched already; or, as `unmerge_adapter`, other code has written merged weights.
                Nothing has changed then.
        """
        self._check_open("unpatch it", while_merged=True)
        if self._merged is not None:
            self._merged.check_unwritten()
        self._training.make_plain()  # while modules have the classes that other code made of theirs
        contents, active = ([], []) if self._taken is None else self._to_give_back(self._taken)
        self._uninstall()
        try:
            if self._taken is not None:
                give_back(self._taken, contents, active)
        except BaseException:
            self._install()
            raise
        if self._merged is not None:
            self.unmerge_adapter()
        self._training.end()
        return self.model if self._taken is None else self._taken.owner

    def __repr__(self) -> str:
        """The runtime in a line."""
        worn = ", ".join(str(mix.mix) for mix in self._routing.route.mixes)
        return (
            f"Runtime({type(self.model).__name__}, {self.backend} backend, {len(self.sites)} sites, "
            f"adapters={self.adapters}, worn: {worn})"
        )

    def _mix(self, spec: MixLike) -> Mix:
        mix = read_mix(spec, self._tiers.knows)
        if mix.weights is not None and sum(map(abs, mix.weights)) > _LARGEST:
            raise ValueError(f"the weights of {mix} are too large for float32")
        return mix

    def _fetch(self, mixes: Sequence[Mix]) -> Fetched:
        """Reads the registered adapters of mixes that are in no memory; nothing where none was ever registered."""
        if self._tiers.is_empty:  # asked first, as each switch comes here
            return NOTHING
        return self._tiers.fetch(name for mix in mixes for name in mix.adapters)

    def _fetch_named(self, names: Sequence[str]) -> Fetched:
        return NOTHING if self._tiers.is_empty else self._tiers.fetch(names)

    def _resolve(self, mix: Mix, fetched: Fetched) -> ResolvedMix:
        return self._tiers.resolve((mix,), fetched)[0]

    @alone
    def _wear_everywhere(self, mixes: Sequence[Mix], fetched: Fetched) -> None:
        self._check_open("switch adapters")
        self._routing.wear_everywhere(Route(tuple(self._tiers.resolve(mixes, fetched))))

    @alone
    def _wear_here(
        self,
        mixes: Sequence[Mix],
        fetched: Fetched,
        index: Tensor | None,
        images: Sequence[int] | None,
        starts: Sequence[int] | None,
    ) -> Wearing:
        self._check_open("route rows")
        route = Route.by_row(self._tiers.resolve(mixes, fetched, lambda each: check_rows(each, index, starts)), index)
        if starts is not None:
            route = route.starting(starts, self._bank.resolve(BASE))
        return self._routing.wear_here(route, images)

    def _check_name(self, name: str) -> None:
        self._bank.adapters.check_name(name)
        if self._tiers.is_registered(name):
            raise ValueError(f"an adapter named {name!r} is registered: delete_adapter it first, or use another name")

    def _check_open(self, what: str, while_merged: bool = False) -> None:
        if not self._placement.is_installed:
            raise RuntimeError(f"cannot {what}: the model is not patched any more; call ia3rt.patch(model) again")
        if self._merged is not None and not while_merged:
            raise RuntimeError(f"cannot {what} while adapters are merged: call unmerge_adapter() first")

    def _install(self) -> None:
        vars(self.model)["ia3_runtime"] = self
        self._placement.install()

    def _uninstall(self) -> None:
        self._placement.uninstall()
        vars(self.model).pop("ia3_runtime", None)

    def _adopt(self, taken: TakenOver) -> None:
        for name, vectors in taken.vectors.items():
            self.add_adapter(name, vectors, taken.configs.get(name), taken.modules.get(name))
        if taken.active:
            self.set_adapter(taken.active)

    def _to_give_back(self, taken: TakenOver) -> tuple[list[AdapterContents], list[str]]:
        """The adapters that PEFT is to have, and those that are active; raises ValueError where it cannot."""
        active = active_in_peft([mix.mix for mix in self._routing.chosen.mixes])
        # What is only registered, and not worn, is resident or not by chance.
        names = [name for name, each in self._bank.adapters.items() if each.stamp is None or name in active]
        contents = [self._contents(name) for name in names]
        check_givable(taken, contents)
        return contents, active

    @alone
    def _add(self, name: str, vectors: Mapping[Site, Tensor], config: dict[str, Any], own: Brought) -> None:
        self._check_name(name)  # it may have got another meaning since it was looked at first
        self._placement.add(name, vectors, config, own)
