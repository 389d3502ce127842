"""Lets routes follow `generate`, which repeats each row for beams and for returned sequences."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

from torch import nn

from ia3rt.routing.route import Routing


def install(model: nn.Module, routing: Routing) -> None:
    """Wraps `generate` on this one model, so that the route learns by how much the rows are expanded."""
    if hasattr(type(model), "generate"):
        # Bound methods, not closures: a deep copy of the model binds its own.
        vars(model).update(
            ia3_generation=routing,
            generate=MethodType(_generate, model),
            _expand_inputs_for_generation=MethodType(_expand_inputs_for_generation, model),
        )


def uninstall(model: nn.Module) -> None:
    """Takes `install` back."""
    for name in ("generate", "_expand_inputs_for_generation", "ia3_generation"):
        vars(model).pop(name, None)


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    routing: Routing = self.ia3_generation
    routing.expand = 1
    try:
        return _original(self, "generate")(*args, **kwargs)
    finally:
        routing.expand = None


def _expand_inputs_for_generation(self: Any, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
    self.ia3_generation.expand = expand_size
    return _original(self, "_expand_inputs_for_generation")(*args, expand_size=expand_size, **kwargs)


def _original(model: nn.Module, name: str) -> Any:
    return inspect.getattr_static(type(model), name).__get__(model, type(model))
