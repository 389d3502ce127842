"""What tuning has to know of an operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ia3rt.bench.layers.case import Inputs
from ia3rt.bench.shapes import Shape

Run = Callable[[Any, int], object]
"""Launches with a config, of a turn's weights; None is torch's own way."""


@dataclass(frozen=True)
class Operation:
    """One operation, whose name is that in a card's file."""

    name: str
    shapes: Callable[[Shape, torch.dtype, Iterable[int]], Iterator[Any]]
    """(a model's widths, dtype, numbers of rows) to what the patched model launches."""
    candidates: Callable[[Any, str, int], list[Any]]
    """(shape, architecture, processors) to the default, and configs that may be faster."""
    runner: Callable[[Any, Inputs], Run]
    """Makes what a shape's launch reads, on a device or on none: several weights, so that no cache holds them."""


def distinct(configs: Iterable[Any]) -> list[Any]:
    """Return them without those that were before."""
    return list(dict.fromkeys(configs))
