"""Random programs of forwards, switches, threads and backward passes, beside a model copied for each adapter.

tests/test_programs.py has the adapters themselves; here they stay, and what matters is who wears them when.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tiny import scaled, tiny_model, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ia3rt

NAMES = [None, "a", "b", "c"]
ROWS, IDS = 2, token_ids(2, 5)
Spec = Any

specs = st.one_of(st.sampled_from(NAMES), st.lists(st.sampled_from(NAMES), min_size=ROWS, max_size=ROWS).map(tuple))
forwards = st.fixed_dictionaries(
    {"checkpointing": st.sampled_from([None, "reentrant", "not reentrant", "whole"]), "grad": st.booleans()}
)
steps = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(NAMES)),
    st.tuples(st.just("route"), specs),
    st.tuples(st.just("disable"), st.none()),
    st.tuples(st.just("leave"), st.none()),
    st.tuples(st.just("forward"), forwards),
    st.tuples(st.just("forward"), forwards),
    st.tuples(st.just("backward"), st.integers(0, 3)),
    st.tuples(st.just("load"), st.none()),
)
programs = st.lists(steps, min_size=3, max_size=14)


@functools.cache
def _vectors() -> dict[str, dict[tuple[str, str], Tensor]]:
    sites = ia3rt.patch(tiny_model()).sites
    generator = torch.Generator().manual_seed(8)
    return {name: {site.key: torch.rand(site.width, generator=generator) + 0.5 for site in sites} for name in "abc"}


class Slow:
    """The slow runtime: a float64 model for each adapter, and a row's result is that of its own."""

    def __init__(self) -> None:
        self._models: dict[str | None, nn.Module] = {None: tiny_model().double()}
        for name, vectors in _vectors().items():
            self._models[name] = scaled(tiny_model(), {key: vector.double() for key, vector in vectors.items()})
        self._known: dict[tuple[str | None, int], tuple[Tensor, Tensor]] = {}

    def row(self, name: str | None, row: int) -> tuple[Tensor, Tensor]:
        """A row's logits, and the gradient of their sum of squares by its embeddings."""
        if (name, row) not in self._known:
            model = self._models[name]
            embeddings = model.get_input_embeddings()(IDS[row : row + 1]).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings).logits
            logits.square().sum().backward()
            self._known[name, row] = logits[0].detach(), embeddings.grad[0]
        return self._known[name, row]


@functools.cache
def _slow() -> Slow:
    return Slow()


class Session:
    """What one thread does with the model, and what it should see."""

    def __init__(self, runtime: ia3rt.Runtime, worn_everywhere: Callable[[], str | None]) -> None:
        self._runtime = runtime
        self._everywhere = worn_everywhere
        self._entered: list[tuple[Any, Spec]] = []
        self._pending: list[tuple[Tensor, Tensor, tuple[str | None, ...]]] = []

    def run(self, program: list[tuple[str, Any]], may_set: bool) -> None:
        for step, argument in program:
            if step == "set" and may_set and not self._entered:
                self._runtime.set_adapter(argument)
            elif step in ("route", "disable"):
                self._enter(argument if step == "route" else None, step)
            elif step == "leave" and self._entered:
                self._entered.pop()[0].__exit__(None, None, None)
            elif step == "forward":
                self._forward(**argument)
            elif step == "backward" and self._pending:
                self._backward(argument % len(self._pending))
            elif step == "load":
                name = f"x{threading.get_ident()}"
                self._runtime.add_adapter(name, {key: torch.zeros_like(v) for key, v in _vectors()["a"].items()})
                self._runtime.delete_adapter(name)
        while self._pending:
            self._backward(0)
        while self._entered:
            self._entered.pop()[0].__exit__(None, None, None)

    def _enter(self, spec: Spec, step: str) -> None:
        rows = list(spec) if isinstance(spec, tuple) else [spec] * ROWS
        context = self._runtime.disable_adapter() if step == "disable" else self._runtime.route(rows)
        context.__enter__()
        self._entered.append((context, tuple(rows)))

    def _worn(self) -> tuple[str | None, ...]:
        return self._entered[-1][1] if self._entered else (self._everywhere(),) * ROWS

    def _forward(self, checkpointing: str | None, grad: bool) -> None:
        model, worn = self._runtime.model, self._worn()
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_(grad)

        def run(x: Tensor) -> Tensor:
            return model(inputs_embeds=x, use_cache=False).logits

        with torch.set_grad_enabled(grad):
            if checkpointing is None or not grad:
                logits = run(embeddings)
            elif checkpointing == "whole":
                logits = checkpoint(run, embeddings, use_reentrant=False)
            else:
                logits = _by_blocks(model, checkpointing == "reentrant", run, embeddings)
        self._compare(logits, worn, 0)
        if grad:
            self._pending.append((embeddings, logits, worn))

    def _backward(self, place: int) -> None:
        embeddings, logits, worn = self._pending.pop(place)
        logits.square().sum().backward()
        assert embeddings.grad is not None
        self._compare(embeddings.grad, worn, 1)

    def _compare(self, actual: Tensor, worn: tuple[str | None, ...], part: int) -> None:
        for row, name in enumerate(worn):
            right = _slow().row(name, row)[part]
            torch.testing.assert_close(
                actual[row].detach().double(), right, rtol=1e-3, atol=float(right.abs().max()) * 1e-4
            )


_block = threading.local()


def _by_blocks(model: nn.Module, reentrant: bool, run: Callable[[Tensor], Tensor], embeddings: Tensor) -> Tensor:
    """A forward whose blocks are computed again for their gradients, in this thread only."""
    _block.how = reentrant
    try:
        return run(embeddings)
    finally:
        _block.how = None


def _checkpoint_blocks(model: nn.Module) -> None:
    """Lets blocks be checkpointed as `_by_blocks` says: gradient_checkpointing_enable() is for all threads."""
    for layer in model.model.layers:
        forward = layer.forward

        def block(hidden: Tensor, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            how = getattr(_block, "how", None)
            if how is None:
                return forward(hidden, *args, **kwargs)
            return checkpoint(lambda x: forward(x, *args, **kwargs), hidden, use_reentrant=how)

        layer.forward = block


def _patched() -> ia3rt.Runtime:
    model = tiny_model().requires_grad_(False)
    _checkpoint_blocks(model)
    runtime = ia3rt.patch(model, capacity=4)
    for name, vectors in _vectors().items():
        runtime.add_adapter(name, copy.deepcopy(vectors))
    return runtime


@settings(max_examples=80, deadline=None)
@given(program=programs)
def test_one_thread(program: list[tuple[str, Any]]) -> None:
    runtime = _patched()
    Session(runtime, lambda: (*runtime.active_adapters, None)[0]).run(program, may_set=True)


@settings(max_examples=25, deadline=None)
@given(everywhere=st.sampled_from(NAMES), by_thread=st.lists(programs, min_size=2, max_size=3))
def test_several_threads(everywhere: str | None, by_thread: list[list[tuple[str, Any]]]) -> None:
    """At once; and where gradients are computed again under adapters that cannot be told apart, an error says so."""
    runtime = _patched()
    runtime.set_adapter(everywhere)
    errors: list[BaseException] = []

    def run(program: list[tuple[str, Any]]) -> None:
        try:
            Session(runtime, lambda: everywhere).run(program, may_set=False)
        except RuntimeError as error:
            if "forwards of several threads" not in str(error):
                errors.append(error)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(program,)) for program in by_thread]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.slow
class TestMore:
    test_one_thread = staticmethod(
        settings(max_examples=300, deadline=None)(given(program=programs)(test_one_thread.hypothesis.inner_test))
    )
