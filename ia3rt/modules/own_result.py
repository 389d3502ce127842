"""Forwards of torch's own whose result is new, so that it may be overwritten."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn


def own_result(cls: Any, known: Collection[type[nn.Module]]) -> Callable[[nn.Module, Tensor], Tensor | None] | None:
    """The forward of a class, where it is one of the `known` and not made of them; None for any other.

    It gives None for a layer that has to run by its class: other code replaced that forward, or what stands in the
    weight's place is no plain tensor, and may return anything.
    """
    if cls not in known:
        return None
    forward = cls.forward

    def own(layer: nn.Module, x: Tensor) -> Tensor | None:
        weight = layer.__dict__["_parameters"].get("weight")
        if (type(weight) is nn.Parameter or type(weight) is Tensor) and cls.forward is forward:
            return forward(layer, x)  # type: ignore[no-any-return]
        return None

    return own
