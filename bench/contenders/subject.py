"""A model with adapters, as one contender serves it, and the ways of using it that are timed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # AdapterHub's worker runs this file in an environment without ia3rt
    from ia3rt.adapters.site import SiteKey
    from ia3rt.bench.contenders.questions import Questions


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
        repeats: whether a measurement may hold several runs, one straight after another.
        first: what `run` does before it computes: it says what the rows wear.
        compute: what `run` then does, and a CUDA graph can hold: it gives the device the same work each time. None
            where no part of it is such.
    """

    run: Callable[[int], object]
    result: Callable[[], Tensor] | None = None
    before: Callable[[int], None] = lambda _: None
    after: Callable[[], None] = lambda: None
    note: str = ""
    repeats: bool = True
    first: Callable[[], object] = lambda: None
    compute: Callable[[], Tensor] | None = None

    @classmethod
    def computing(
        cls,
        compute: Callable[[], Tensor],
        first: Callable[[], object] = lambda: None,
        compared: bool = True,
        note: str = "",
    ) -> Way:
        """The way that does `first`, and then computes; it is compared with the others' unless told otherwise."""

        def run(_: int) -> Tensor:
            first()
            return compute()

        return cls(run, (lambda: run(0)) if compared else None, note=note, first=first, compute=compute)


class Subject:
    """A model with adapters: what it does with them is a contender's own, the ways to time that are the same for all.

    What a contender cannot do raises LeftOut.

    Args:
        model: a Hugging Face causal language model, or what wraps one; None where it is in another process.
    """

    adapted = True
    """Whether what it computes depends on the adapters."""
    does_no_more = "it holds no adapters"
    """Why it is left out of what it does not do."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.forward: Callable[..., Any] = model

    def wear(self, names: Sequence[str]) -> None:
        """Makes all rows wear the product of these adapters."""
        raise LeftOut(self.does_no_more)

    def adder(self, vectors: dict[SiteKey, Tensor]) -> Callable[[str], object]:
        """What adds an adapter of these vectors under a name."""
        raise LeftOut(self.does_no_more)

    def loader(self, folder: Path) -> Callable[[str], object]:
        """What loads a checkpoint from the disk under a name."""
        raise LeftOut(self.does_no_more)

    def remove(self, name: str) -> None:
        """Deletes an adapter."""
        raise LeftOut(self.does_no_more)

    def trained(self, name: str) -> Sequence[nn.Parameter]:
        """The vectors of an adapter, which is worn, as the only parameters that are trained."""
        raise LeftOut(self.does_no_more)

    def resident_bytes(self) -> int:
        """The bytes of all adapters that it holds."""
        raise LeftOut(self.does_no_more)

    def mixed(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """A forward over prompts [rows, length] in which row i wears worn[i]."""
        raise LeftOut(self.does_no_more)

    def document(self, questions: Questions) -> Way:
        """Answers to questions about one document; compared by the logits of their first tokens."""
        raise LeftOut(self.does_no_more)

    def close(self) -> None:
        """Ends what was started for it."""
        return

    def prefill(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """One forward over prompts [rows, length] without a cache, for the logits of the last position."""
        self.wear(worn)
        return Way.computing(lambda: self._logits(ids), compared=self.adapted)

    def decode(self, ids: Tensor, worn: Sequence[str]) -> Way:
        """One step after prompts [rows, length]; the cache is put back to their end in each."""
        self.wear(worn)
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        with_cache = {cache_argument(): cache, "use_cache": True}
        token = ids[:, -1:].contiguous()
        with torch.inference_mode():
            self.model(input_ids=ids, logits_to_keep=1, **with_cache)
        prompts = [(layer.keys, layer.values) for layer in cache.layers]

        def step() -> Tensor:
            for layer, (keys, values) in zip(cache.layers, prompts, strict=True):
                layer.keys, layer.values = keys, values
            with torch.inference_mode():
                logits: Tensor = self.forward(input_ids=token, **with_cache).logits
            return logits

        return Way.computing(step, compared=self.adapted)

    def generate(self, ids: Tensor, worn: Sequence[str], tokens: int, static: bool = False) -> Way:
        """So many tokens a row by the model's own generate(), greedy.

        Args:
            ids: prompts [rows, length].
            worn: the adapters whose product all rows wear.
            tokens: how many, at least two.
            static: whether the cache is of one size throughout, so that transformers compiles the steps on a GPU.
        """
        options: dict[str, Any] = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        mask = torch.ones_like(ids)
        if static:
            compile_each_model()
            self.wear(worn)
            options["cache_implementation"] = "static"

        def generate(**more: Any) -> Any:
            return self.model.generate(input_ids=ids, attention_mask=mask, **options, **more)

        def second_step() -> Tensor:
            """The logits after the prompts and their last tokens once more, as `decode` has them."""
            wanted = {"output_logits": True, "return_dict_in_generate": True}
            logits: Tensor = generate(**wanted, logits_processor=[_Always(ids[:, -1:])]).logits[1]
            return logits

        # What is compared depends on the cache, and is no token: the two largest logits may lie as close as rounding.
        compared = second_step if static else self.decode(ids, worn).result
        return Way(lambda _: generate(), compared if self.adapted else None)

    def switch(self, mixes: Sequence[Sequence[str]], then: Tensor | None = None, after: Tensor | None = None) -> Way:
        """Wearing the product of another of `mixes` at each turn, and a forward over `then` where it is given.

        The result is that of the forward under the second of the mixes. Where `after` is given, a forward over it
        comes before each turn, and is not measured: what switching needs has left the cores' caches.
        """
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

        if after is not None:

            def before(_: int) -> None:
                self._logits(after)

            return Way(run, before=before, repeats=False)
        return Way(run, None if then is None else result)

    def add(self, vectors: dict[SiteKey, Tensor]) -> Way:
        """Adding an adapter from tensors."""
        return self._then_removed(self.adder(vectors))

    def load(self, folder: Path) -> Way:
        """Loading a checkpoint from the disk."""
        return self._then_removed(self.loader(folder))

    def from_host(self) -> Way:
        """Wearing an adapter that is in the host's memory only."""
        raise LeftOut("an adapter is loaded, or it is on the disk")

    def from_disk(self, folder: Path) -> Way:
        """Wearing an adapter that is on the disk only; where it has to be loaded, loading it."""
        return self.load(folder)

    def delete(self, vectors: dict[SiteKey, Tensor]) -> Way:
        """Deleting an adapter that was added before the measurement."""
        add, added = self.adder(vectors), list[str]()

        def before(turns: int) -> None:
            while len(added) < turns:
                name = f"added{len(added)}"
                add(name)
                added.append(name)

        return Way(lambda _: self.remove(added.pop()), before=before)

    def train(self, ids: Tensor, name: str) -> Way:
        """A step: forward, backward, and AdamW on the vectors of one adapter."""
        optimizer = torch.optim.AdamW(self.trained(name), lr=1e-3)
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

    def _then_removed(self, add: Callable[[str], object]) -> Way:
        """The way that adds; what a measurement added is removed after it."""
        added: list[str] = []

        def run(_: int) -> None:
            name = f"added{len(added)}"
            add(name)
            added.append(name)

        def after() -> None:
            while added:
                self.remove(added.pop())

        return Way(run, after=after)

    def _logits(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.forward(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits


class _Always:
    """A logits processor that leaves each row one token to choose: int64 [rows, 1]."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, self._tokens, 0.0)


def compile_each_model() -> None:
    """Has torch compile each model and each shape: one that fell back to eager would be timed as what it is not."""
    config: Any = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 1024
    config.fail_on_recompile_limit_hit = True


def cache_argument() -> str:
    """What transformers' models call their cache: newer ones warn of the older name."""
    from transformers import LlamaForCausalLM

    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
