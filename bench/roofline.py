"""The least time of a kernel on a card: its bytes at the memory's speed, or its operations at the tensor cores'."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Work(NamedTuple):
    """What one kernel moves between memory and the processors, each tensor once, and what it multiplies and adds."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Card:
    """A GPU's limits, as its maker states them."""

    bytes_per_second: float
    flops_per_second: float
    """Of dense 16-bit matrices, accumulated in float32."""


H100 = Card(bytes_per_second=3.35e12, flops_per_second=989e12)  # SXM


def seconds(kernels: Iterable[Work], card: Card) -> float:
    """Return the least time of kernels that run one after another, without what their launches cost."""
    return sum(max(work.bytes / card.bytes_per_second, work.flops / card.flops_per_second) for work in kernels)
