"""A model with adapters, as one contender serves it, and the ways of using it that are timed."""

from __future__ import annotations

import inspect
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ia3rt.adapters.site import SiteKey


class LeftOut(Exception):  # noqa: N818  (nothing is wrong: a contender does not do this)
    """Why a contender is not timed in a case."""


@dataclass(frozen=True)
class Way:
    """How a contender does what a case times.

    Attributes:
        run: does it once, and is given the turn. Returns Seconds where it took its time itself.
        result: what it computes, to be compared with the others' before anything is timed; None where it is another
            thing than they compute.
        before: called with the number of turns before each measurement, and not measured.
        after: called after each measurement, and not measured.
        note: what a reader has to know about how it is done.
    """

    run: Callable[[int], object]
    result: Callable[[], Tensor] | None = None
    before: Callable[[int], None] | None = None
    after: Callable[[], None] | None = None
    note: str = ""


class Subject(ABC):
    """A model with adapters. What a contender cannot do raises LeftOut."""

    adapted = True
    """Whether what it computes depends on the adapters."""
    does_no_more = "it holds no adapters"
    """Why it is left out of what it does not do."""

    @abstractmethod
    def prefill(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """One forward over prompts [rows, length], all rows wearing the product of `worn`."""

    @abstractmethod
    def decode(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """One step after prompts [rows, length] that are in the cache."""

    @abstractmethod
    def generate(self, ids: Tensor, worn: Sequence[str], tokens: int) -> Way:
        """Greedy generation of so many tokens a row."""

    @abstractmethod
    def switch(self, mixes: Sequence[Sequence[str]], then: Tensor | None = None) -> Way:
        """Wearing the product of another of `mixes` at each turn, and a forward over `then` where it is given."""

    def mixed(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """A forward over prompts [rows, length] in which row i wears worn[i]."""
        raise LeftOut(self.does_no_more)

    def add(self, vectors: dict[SiteKey, Tensor]) -> Way:
        """Adding an adapter from tensors."""
        raise LeftOut(self.does_no_more)

    def delete(self, vectors: dict[SiteKey, Tensor]) -> Way:
        """Deleting an adapter that `add` added."""
        raise LeftOut(self.does_no_more)

    def load(self, folder: Path) -> Way:
        """Loading a checkpoint from the disk."""
        raise LeftOut(self.does_no_more)

    def train(self, ids: Tensor, name: str) -> Way:
        """A step: forward, backward, and AdamW on the vectors of one adapter."""
        raise LeftOut(self.does_no_more)

    def load_many(self, folders: dict[str, Path]) -> None:
        """Loads checkpoints under these names."""
        raise LeftOut(self.does_no_more)

    def resident_bytes(self) -> int:
        """The bytes of all adapters that it holds."""
        raise LeftOut(self.does_no_more)

    def close(self) -> None:
        """Ends what was started for it."""
        return


class InProcess(Subject):
    """A subject whose model is a module of this process.

    Args:
        model: a Hugging Face causal language model, or what wraps one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.forward: Callable[..., Any] = model

    @abstractmethod
    def wear(self, names: Sequence[str]) -> None:
        """Makes all rows wear the product of these adapters."""

    def prefill(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """Without a cache, and with the logits of the last position."""
        self.wear(worn)

        def run(_: int) -> Tensor:
            return self._logits(ids)

        return Way(run, (lambda: run(0)) if self.adapted else None)

    def decode(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """The cache is put back to the prompts' end in each step."""
        self.wear(worn)
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        with_cache = {_cache_argument(): cache, "use_cache": True}
        token = ids[:, -1:].contiguous()
        with torch.inference_mode():
            self.model(input_ids=ids, logits_to_keep=1, **with_cache)
        prompts = [(layer.keys, layer.values) for layer in cache.layers]

        def run(_: int) -> Tensor:
            for layer, (keys, values) in zip(cache.layers, prompts, strict=True):
                layer.keys, layer.values = keys, values
            with torch.inference_mode():
                logits: Tensor = self.forward(input_ids=token, **with_cache).logits
            return logits

        return Way(run, (lambda: run(0)) if self.adapted else None)

    def generate(self, ids: Tensor, worn: Sequence[str], tokens: int) -> Way:
        """By the model's own generate()."""
        checked = self.decode(ids, worn)  # whose result depends on the cache
        options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        mask = torch.ones_like(ids)

        def run(_: int) -> None:
            self.model.generate(input_ids=ids, attention_mask=mask, **options)

        return Way(run, checked.result)

    def switch(self, mixes: Sequence[Sequence[str]], then: Tensor | None = None) -> Way:
        """The result is that of a forward under the second of the mixes."""
        if not self.adapted:
            raise LeftOut("it has nothing to switch")

        def run(turn: int) -> Tensor | None:
            self.wear(mixes[turn % len(mixes)])
            return None if then is None else self._logits(then)

        def result() -> Tensor:
            run(0)
            logits = run(1)
            assert logits is not None
            return logits

        return Way(run, None if then is None else result)

    def _logits(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.forward(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    def _one_after_another(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """How a contender that knows one adapter for all rows serves a mixed batch: a forward an adapter."""
        rows = {name: [row for row, other in enumerate(worn) if other == name] for name in dict.fromkeys(worn)}
        parts = {name: ids[positions] for name, positions in rows.items()}
        order = torch.tensor([row for positions in rows.values() for row in positions], device=ids.device).argsort()

        def run(_: int) -> Tensor:
            pieces = []
            for name, part in parts.items():
                self.wear((name,))
                pieces.append(self._logits(part))
            return torch.cat(pieces)[order]

        note = f"cannot mix rows: its {len(parts)} adapters run one after another"
        return Way(run, lambda: run(0), note=note)

    def _adding(self, add: Callable[[str], object], delete: Callable[[str], None], note: str = "") -> Way:
        """The way that adds; what a measurement added is deleted after it."""
        added: list[str] = []

        def run(turn: int) -> None:
            name = f"added{len(added)}"
            add(name)
            added.append(name)

        def after() -> None:
            while added:
                delete(added.pop())

        return Way(run, after=after, note=note)

    def _deleting(self, add: Callable[[str], None], delete: Callable[[str], object]) -> Way:
        """The way that deletes what was added before the measurement."""
        added: list[str] = []

        def before(turns: int) -> None:
            while len(added) < turns:
                name = f"added{len(added)}"
                add(name)
                added.append(name)

        def run(turn: int) -> None:
            delete(added.pop())

        return Way(run, before=before)

    def _training(self, ids: Tensor, parameters: Sequence[torch.nn.Parameter]) -> Way:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        self.model.train()

        def loss() -> Tensor:
            value: Tensor = self.forward(input_ids=ids, labels=ids, use_cache=False).loss
            return value

        def run(_: int) -> None:
            loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        def result() -> Tensor:
            self.model.eval()  # no dropout
            value = loss().detach().reshape(1)
            self.model.train()
            return value

        return Way(run, result)


class Compiled:
    """A mixin: the forward of an in-process subject goes through torch.compile.

    Each shape of a batch is compiled for itself, and all are kept: a shape that falls back to eager would be timed as
    something that it is not.
    """

    forward: Callable[..., Any]

    def compile(self, model: Any) -> None:
        """Compiles the forward, when it is first called."""
        compiler = os.environ.get("CXX", "g++")
        if next(model.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
            raise LeftOut(f"torch.compile needs a C++ compiler, and there is no {compiler}")
        config: Any = torch._dynamo.config
        config.recompile_limit = config.accumulated_recompile_limit = 1024
        config.fail_on_recompile_limit_hit = True
        self.forward = torch.compile(model, dynamic=False)

    def generate(self, ids: Tensor, worn: Sequence[str], tokens: int) -> Way:
        """Left out."""
        raise LeftOut("generate() grows its cache, so that each step has a shape of its own to compile")


def _cache_argument() -> str:
    """What transformers' models call their cache: newer ones warn of the older name."""
    from transformers import LlamaForCausalLM

    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
