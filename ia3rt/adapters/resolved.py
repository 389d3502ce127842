"""A mix whose adapters are resident: rows of the bank, and what weights leave of 1."""

from __future__ import annotations

import math
from typing import NamedTuple

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.mix import Mix, added_up

_ROUNDING = 1e-12  # of weights, in float64; far below what float32 tells from 1


class ResolvedMix(NamedTuple):
    """A mix whose adapters are resident: what the kernels and the torch backend evaluate.

    Whoever holds it holds its rows: they are not used for anything else meanwhile.

    `delta` has become `linear` here: 1 + Σ w_j (l_j - 1) is the weighted sum with the identity at 1 - Σ w_j. And
    `linear` has got the complement of its adapters' sites at that weight: where none of them acts, the sum is 1.
    """

    mix: Mix
    adapters: tuple[Adapter, ...]
    rows: tuple[int, ...]
    weights: tuple[float, ...] | None
    complement: Adapter | None = None

    def without_others(self, mix: Mix) -> ResolvedMix:
        """The same of the adapters that are left in `mix`, which is this mix, or a product of some of its adapters."""
        if mix == self.mix:
            return self
        left = tuple(adapter for adapter in self.adapters if adapter.name in mix.adapters)
        return ResolvedMix(mix, left, tuple(adapter.row for adapter in left), None)

    @property
    def terms(self) -> tuple[object, ...]:
        """What is equal for equal mixes, in whatever order they are written: factors, or terms with their weights."""
        if self.weights is None:
            return self.rows if len(self.rows) < 2 else tuple(sorted(self.rows))
        return tuple(added_up(zip(self.rows, self.weights, strict=True)).items())


def leaves_a_rest(mix: Mix) -> bool:
    """Whether a mix is a weighted sum that needs a row for what its adapters leave as it is."""
    return mix.weights is not None and mix.combination_type != "delta" and bool(rest_of(mix))


def rest_of(mix: Mix) -> float:
    """What the weights leave of 1; nothing where that is only what rounding left of it."""
    weights = mix.weights or ()
    try:
        rest = 1.0 - math.fsum(weights)
    except OverflowError:  # of numbers that sum to infinity in turn
        rest = 1.0 - sum(weights)
    return rest if abs(rest) > _ROUNDING else 0.0
