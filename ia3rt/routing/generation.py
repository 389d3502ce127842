"""Lets routes follow `generate`: what it repeats, drops or runs by itself keeps the mixes that its rows had.

Beams and returned sequences repeat rows where transformers expands its inputs; Whisper transcribes long audio piece by
piece, and drops a row when it has ended or need not be tried again. These say which rows they go on with, and that is
read here. Where another model's `generate` changes its rows, they are no longer as many, and the forward is refused.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ia3rt.adapters.set_on import before, set_on, take_off
from ia3rt.routing.batch import cached, main_input, named_arguments
from ia3rt.routing.route import Route
from ia3rt.routing.routing import Routing

_WRAPPED = "ia3_wrapped"  # the attribute that keeps what is wrapped
_generation: ContextVar[Generation | None] = ContextVar("ia3_generation", default=None)


class Generation:
    """A call of `generate` that is running. Each of its rows stands for one of the route's.

    What was worn when it began is worn until it ends, whatever another thread switches to meanwhile.

    Attributes:
        repeats: how often Whisper itself repeats each row, for the sequences to return.
        attempt: the rows that Whisper decodes now; it tries some of them again.
        arguments: of the call, by name; `inputs` is what may be given by place.
    """

    def __init__(self, routing: Routing, arguments: Mapping[str, Any]) -> None:
        self.routing = routing
        self.arguments = arguments
        self.repeats = 1
        self.attempt: list[int] = []
        self._again: list[int] = []
        self._padded = 0
        self._rows: list[int] | None = None  # of the route, one for each of the batch
        self._route = routing.route
        self._expanded: Route | None = None
        self._before = routing.pin()
        self._outer = _generation.get()
        _generation.set(self)

    def end(self) -> None:
        """Wears again what was worn before."""
        _generation.set(self._outer)
        self.routing.wear_again(self._before)

    def begin_with(self, batch: Tensor | None, past: int | None) -> None:
        """Checks the tokens of a route by token, which generation goes on from.

        Raises:
            ValueError: they are not the prompt's.
        """
        index = self._route.index
        if index is None or index.dim() < 2 or batch is None or batch.dim() < 2 or past != 0:
            return
        if batch.shape[1] != index.shape[1]:
            raise ValueError(f"the route has {index.shape[1]} tokens a row, but the batch has {batch.shape[1]}")

    def with_text(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a step of it, and the text of the call among them."""
        given = self.arguments
        text = {name: given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None}
        if not text and given.get("inputs") is not None:
            text = {"input_ids": given["inputs"]}
        return {**arguments, **text}

    def expand(self, batch: Tensor | None, times: int) -> None:
        """Follows the repetition of each row.

        Raises:
            ValueError: the route has neither the rows before it nor those after it.
        """
        index = self._route.index
        if index is None or batch is None or times == 1 or self._is_switched():
            return
        count = batch.shape[0]
        rows = self._rows if self._rows is not None else list(range(len(index)))
        if count == len(rows):
            self._wear([row for row in rows for _ in range(times)])
        elif self._rows is not None or count * times != len(rows):  # else expanded by hand
            raise ValueError(
                f"the route has {len(rows)} rows × {times} sequences each, but the batch has {count * times}: "
                "route() takes one mix for each row of the batch, set_adapter() one for all"
            )

    def decode(self, rows: Sequence[int], padded: int) -> None:
        """Follows Whisper to a piece of some rows, of which those behind `padded` are filled up to it and not read."""
        self._padded = padded
        self.attempt = [row // self.repeats for row in rows]
        self._wear_attempt()

    def tried(self, place: int, needs_another: bool) -> None:
        """Follows Whisper to its next attempt at those rows of this one that need it."""
        if place == 0:
            self._again = []
        if needs_another:
            self._again.append(self.attempt[place])
        if place == len(self.attempt) - 1 and self._again:
            self.attempt = self._again
            self._wear_attempt()

    def _wear_attempt(self) -> None:
        if self._route.index is not None and not self._is_switched():
            rows = self.attempt
            self._wear(rows + rows[:1] * (self._padded - len(rows)))

    def _wear(self, rows: list[int]) -> None:
        index = self._route.index
        assert index is not None
        self._rows = rows
        if max(rows, default=-1) >= len(index):
            raise ValueError(
                f"the route has {len(index)} rows, but generate() goes on with row {max(rows)}: "
                "route() takes one mix for each row of the batch, set_adapter() one for all"
            )
        self._expanded = self._route.of(rows)
        self.routing.wear_pinned(self._expanded)

    def _is_switched(self) -> bool:
        """Whether something else was set since, by what `generate` calls."""
        return self.routing.route is not (self._route if self._expanded is None else self._expanded)


def generation_of(routing: Routing) -> Generation | None:
    """The innermost call of `generate` of a model in this context."""
    generation = _generation.get()
    while generation is not None and generation.routing is not routing:
        generation = generation._outer
    return generation


def install(model: nn.Module, routing: Routing) -> None:
    """Wraps what `generate` is made of, on this one model and those inside it."""
    for module in model.modules():
        kind = type(module)
        if callable(getattr(kind, "generate", None)):
            # Bound methods, not closures: a deep copy of the model binds its own.
            named = {name: method for name, method in _METHODS.items() if callable(getattr(kind, name, None))}
            set_on(module, _WRAPPED, {name: MethodType(method, module) for name, method in named.items()})
            vars(module)["ia3_generation"] = routing


def uninstall(model: nn.Module) -> None:
    """Takes `install` back."""
    for module in model.modules():
        if vars(module).pop("ia3_generation", None) is not None:
            take_off(module, _WRAPPED)


def _running(model: nn.Module) -> Generation | None:
    """The call of `generate` that a model's part of it is in; none where the model is patched no more."""
    return generation_of(vars(model)["ia3_generation"]) if "ia3_generation" in vars(model) else None


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    original = _original(self, "generate")
    if "ia3_generation" not in vars(self):  # other code has kept this, and the model is patched no more
        return original(*args, **kwargs)
    arguments = named_arguments(("inputs",), args, kwargs)
    generation = Generation(self.ia3_generation, arguments)
    try:
        generation.begin_with(main_input(arguments), cached(arguments))
        return original(*args, **kwargs)
    finally:
        generation.end()


def _prepare_multimodal_encoder_kwargs_for_generation(self: Any, model_kwargs: dict[str, Any]) -> Any:
    """Has images and videos seen before the text is read: whose they are the text says, which is not given to this."""
    generation = _running(self)
    original = _original(self, "_prepare_multimodal_encoder_kwargs_for_generation")
    if generation is None:
        return original(model_kwargs)
    ahead = generation.routing.forwards.begin_ahead(self, generation.with_text(model_kwargs), sys._getframe())
    prepared = None
    try:
        prepared = original(model_kwargs)
    finally:
        generation.routing.forwards.end_ahead(ahead, completed=prepared is not None)
    return prepared


def _expand_inputs_for_generation(self: Any, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
    generation = _running(self)
    if generation is not None:
        generation.expand(main_input(named_arguments((), args, kwargs)), expand_size)
    return _original(self, "_expand_inputs_for_generation")(*args, expand_size=expand_size, **kwargs)


def _expand_variables_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
    expanded = _original(self, "_expand_variables_for_generation")(*args, **kwargs)
    generation = _running(self)
    if generation is not None:
        generation.repeats = len(expanded[0]) // kwargs["batch_size"]
    return expanded


def _generate_with_fallback(self: Any, *args: Any, **kwargs: Any) -> Any:
    generation = _running(self)
    if generation is not None:
        is_static = kwargs["generation_config"].cache_implementation == "static"
        generation.decode(kwargs["batch_idx_map"], kwargs["batch_size"] if is_static else 0)
    return _original(self, "generate_with_fallback")(*args, **kwargs)


def _need_fallback(self: Any, *args: Any, **kwargs: Any) -> Any:
    answer = _original(self, "_need_fallback")(*args, **kwargs)
    generation = _running(self)
    if generation is not None:
        generation.tried(args[2], answer[0])
    return answer


def _init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    original = _original(self, "init_continuous_batching")
    if "ia3_generation" not in vars(self):
        return original(*args, **kwargs)
    routing = self.ia3_generation
    _check_left(routing)
    manager = original(*args, **kwargs)
    add = manager.add_request  # which a manager that runs already is asked for, whatever is entered by then

    @functools.wraps(add)
    def add_request(*args: Any, **kwargs: Any) -> Any:
        _check_left(routing)
        return add(*args, **kwargs)

    manager.add_request = add_request
    return manager


def _check_left(routing: Routing) -> None:
    if routing.is_entered:
        raise ValueError(
            "a route is entered here, or disable_adapter(), and transformers' continuous batching (generate_batch) "
            "runs in a thread of its own, which wears what set_adapter() says: leave the route and set_adapter() one "
            "mix for all requests, or call generate()"
        )


_METHODS: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "_prepare_multimodal_encoder_kwargs_for_generation": _prepare_multimodal_encoder_kwargs_for_generation,
    "_expand_inputs_for_generation": _expand_inputs_for_generation,
    "_expand_variables_for_generation": _expand_variables_for_generation,
    "generate_with_fallback": _generate_with_fallback,
    "_need_fallback": _need_fallback,
    "init_continuous_batching": _init_continuous_batching,
}


def _original(model: nn.Module, name: str) -> Any:
    """What stands behind ours: what other code set on the model before, or its class's."""
    set_before = before(model, _WRAPPED)
    if name in set_before:
        return set_before[name]
    return inspect.getattr_static(type(model), name).__get__(model, type(model))
