"""The hooks by which a model's forwards are bound to what is worn; a copy of a part of the model has none that act."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ia3rt.routing.batch import Arguments
from ia3rt.routing.traced import leave_alone

if TYPE_CHECKING:
    from ia3rt.routing.routing import Routing

_dynamo = torch._C._dynamo.eval_frame


class Hook:
    """Bound methods as a hook of a model, which may be compiled.

    torch calls the hooks of the module that is compiled outside of what it compiles. Each would be compiled by itself,
    and what is checked and done around so small a piece of code takes several times as long as the piece: they run as
    they are there, past the compiler. Hooks within what is compiled are a part of it, as where a compiled function
    calls the model.

    Args:
        routing: of the model. The hook is copied with the whole model, whose copy has a Routing of its own; with a part
            of it, of which no Runtime says what it wears, it becomes one that does nothing.
        run: called before, or after, what is not compiled.
        traced: read by the compiler.
        ahead: called where what comes is compiled; `run` where None.
    """

    def __init__(
        self,
        routing: Routing,
        run: Callable[..., Arguments | None],
        traced: Callable[..., None],
        ahead: Callable[..., Arguments | None] | None = None,
    ) -> None:
        self._routing = routing
        self._run, self._traced, self._ahead = run, traced, ahead or run

    def __call__(self, *args: Any) -> Arguments | None:
        """What the methods do."""
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():  # and not by a function of ours
            self._traced(*args)
            return None
        compiler = _dynamo.set_eval_frame(None)
        if compiler is None:
            return self._run(*args)
        try:
            return self._ahead(*args)
        finally:
            _dynamo.set_eval_frame(compiler)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Arguments | None]:
        """The same of the copied model, or nothing."""
        if not self._routing.is_copied(memo):
            return nothing
        run, traced, ahead = copy.deepcopy((self._run, self._traced, self._ahead), memo)
        return Hook(copy.deepcopy(self._routing, memo), run, traced, ahead)


leave_alone(Hook.__call__.__code__)


def nothing(*args: object) -> None:
    """What a hook does where there is nothing to do."""


def install(model: nn.Module, routing: Routing) -> list[RemovableHandle]:
    """Lets a forward of the model, and of each model inside it, bind what is worn; gives what takes that back."""
    hooks: list[RemovableHandle] = []
    forwards = routing.forwards
    for module in models_in(model):
        is_whole = module is model
        before = Hook(
            routing, forwards.before_forward, forwards.before_traced if is_whole else nothing, forwards.before_compiled
        )
        after = Hook(routing, forwards.after_forward, forwards.after_traced if is_whole else nothing)
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, always_call=True))
    return hooks


def models_in(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and those inside it that may be called without it, as `generate` calls an encoder."""
    return (module for module in model.modules() if module is model or hasattr(module, "main_input_name"))
