"""Which adapters are combined into one, and how: what a user says, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Literal, TypeAlias, get_args

from ia3rt.adapters.combining.ties import MajoritySignMethod
from ia3rt.adapters.mix import CombinationType, Mix, as_weights

DerivedType: TypeAlias = Literal[
    "power",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "max_abs",
    "fisher",
    "negate",
    "analogy",
    "slerp",
]
"""Ways of combining that make an adapter of its own. Those of `CombinationType` can be worn by a row as well."""

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_ELECTING = ("ties", "dare_ties")
_RANDOM = ("dare_linear", "dare_ties")
_NORMALIZED = ("linear", "delta", "power", "max_abs", *_PRUNING)
_WEIGHT = {"delta": 0.85}
_DENSITY = {"ties": 0.4}
"""What is taken where none is given: docs/combining.md found it significantly better, in both models that it tested,
and worse in none. For others it found none, or another one for each model."""
_COUNTS = {"negate": (1, "one adapter"), "slerp": (2, "two adapters"), "analogy": (3, "A, B and C of A : B = C : D")}


@dataclass(frozen=True)
class Combination:
    """How an adapter of its own is made of others.

    Attributes:
        adapters: the adapters' names, in order.
        weights: one finite number an adapter; None means 0.85 each for `delta` of two or more, 1 each for a
            `DerivedType` but `slerp`, which needs them, and what it does for a `Mix` of another type.
        combination_type: see the function of this name in ia3rt.adapters.combining, or `Mix`.
        density: for `ties`, where None means 0.4, and `dare_linear`, `dare_ties` and `magnitude_prune`, which need it:
            the share of each vector's numbers that stays, in (0, 1]. It is one of a site's whole vector, with the ones
            outside of its slices.
        majority_sign_method: for `ties` and `dare_ties`: by which sum the sign is elected.
        seed: for `dare_linear` and `dare_ties`: 0 where None. The same seed prunes the same numbers everywhere: they
            depend on it, on the adapter's place in `adapters` and on the site's path and side.
        normalize: whether weights are divided by their sum.

    Raises:
        ValueError: an unknown type, a number of adapters that it does not take, weights that do not fit, a density that
            is missing or outside of (0, 1], or an option that the type does not have.
        TypeError: a seed that is no integer, a density that is no number, or names or weights without an order.
    """

    adapters: Sequence[str]
    weights: Sequence[float] | None = None
    combination_type: CombinationType | DerivedType = "product"
    density: float | None = None
    majority_sign_method: MajoritySignMethod = "total"
    seed: int | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        """Normalises sequences to tuples and checks what the class promises."""
        if isinstance(self.adapters, str):
            raise ValueError(f"adapters must be a sequence of names, got the string {self.adapters!r}")
        if not isinstance(self.adapters, Sequence):  # a set has no order, and a mapping would lose its weights
            raise TypeError(f"adapters must be a list of names: got {self.adapters!r}")
        object.__setattr__(self, "adapters", tuple(self.adapters))
        known = (*get_args(CombinationType), *get_args(DerivedType))
        if self.combination_type not in known:
            named = ", ".join(map(repr, known))
            raise ValueError(f"unknown combination_type {self.combination_type!r}: use one of {named}")
        if not self.adapters:
            raise ValueError("no adapters to combine: give at least one name")
        count, words = _COUNTS.get(self.combination_type, (None, ""))
        if count not in (None, len(self.adapters)):
            raise ValueError(
                f"{self.combination_type!r} is of {words}: got {len(self.adapters)}, {list(self.adapters)}"
            )
        if self.weights is None and self.combination_type in _WEIGHT and len(self.adapters) > 1:
            object.__setattr__(self, "weights", [_WEIGHT[self.combination_type]] * len(self.adapters))
        if self.density is None:
            object.__setattr__(self, "density", _DENSITY.get(self.combination_type))
        object.__setattr__(self, "weights", as_weights(self.adapters, self.weights))
        self._check_types()
        self._check_options()
        self._check_weights()

    def _check_types(self) -> None:
        if self.seed is not None:
            try:
                object.__setattr__(self, "seed", index(self.seed))
            except TypeError:
                raise TypeError(f"seed is {self.seed!r}: it is an integer") from None
        if self.density is not None and (isinstance(self.density, bool) or not isinstance(self.density, int | float)):
            raise TypeError(f"density is {self.density!r}: it is a number in (0, 1]")

    def _check_options(self) -> None:
        kind = self.combination_type
        if kind in _PRUNING and self.density is None:
            raise ValueError(f"{kind!r} needs a density, the share of numbers to keep: give one in (0, 1]")
        if kind in _PRUNING and not 0.0 < (self.density or 0.0) <= 1.0:
            raise ValueError(f"density is {self.density}: it is the share of numbers to keep, and lies in (0, 1]")
        if self.majority_sign_method not in get_args(MajoritySignMethod):
            raise ValueError(f"unknown majority_sign_method {self.majority_sign_method!r}: use 'total' or 'frequency'")
        given: dict[str, tuple[bool, Sequence[str]]] = {
            "density": (self.density is not None, _PRUNING),
            "majority_sign_method": (self.majority_sign_method != "total", _ELECTING),
            "seed": (self.seed is not None, _RANDOM),
            "normalize": (self.normalize, _NORMALIZED),
        }
        for option, (is_given, kinds) in given.items():
            if is_given and kind not in kinds:
                named = ", ".join(map(repr, kinds))
                raise ValueError(f"{kind!r} takes no {option}, which is for {named}: leave it out")

    def _check_weights(self) -> None:
        kind, weights = self.combination_type, self.weights
        if kind in _WEIGHT and weights is None:  # a weight that nobody named would weaken one adapter unasked
            raise ValueError(
                f"{kind!r} of one adapter needs its weight: what is taken where none are given, {_WEIGHT[kind]} each, "
                "is for two or more"
            )
        if kind in get_args(CombinationType):
            Mix(tuple(self.adapters), weights and tuple(weights), kind)  # type: ignore[arg-type]
        if self.normalize and weights is not None:
            total = sum(weights)
            if not math.isfinite(total) or not abs(total) > 1e-9 * sum(map(abs, weights)):
                told = total if not math.isfinite(total) else 0
                raise ValueError(
                    f"weights {list(weights)} sum to {told}, and cannot be normalized: their sum divides them"
                )
        if kind == "slerp" and (weights is None or abs(sum(weights) - 1.0) > 1e-6):
            raise ValueError(f"'slerp' needs the weights (1 - t, t), which sum to 1: got {weights and list(weights)}")
        if kind == "fisher" and weights is not None and (min(weights) < 0 or not any(weights)):
            raise ValueError(f"'fisher' is an average: weights are 0 or more, and not all 0, got {list(weights)}")

    @property
    def used_weights(self) -> tuple[float, ...]:
        """The weights as they enter the formula."""
        weights = tuple(self.weights or (1.0,) * len(self.adapters))
        return tuple(weight / sum(weights) for weight in weights) if self.normalize else weights

    @property
    def taken_weights(self) -> tuple[float, ...] | None:
        """The same, but None of a product, which has none."""
        return None if self.combination_type == "product" else self.used_weights

    @property
    def is_of_whole_vectors(self) -> bool:
        """Whether a number depends on others of its site, or on which site it is, and not on its own place alone."""
        return self.combination_type == "slerp" or (self.combination_type in _PRUNING and self.density != 1)

    @property
    def in_full(self) -> str:
        """It with what is taken where nothing was given: `ties of a and b, weights 1 and 1, density 0.4`."""
        taken = self.taken_weights
        weights = "" if taken is None else f", weights {' and '.join(f'{weight:g}' for weight in taken)}"
        return f"{self}{weights}{'' if self.density is None else f', density {self.density:g}'}"

    @property
    def mix(self) -> Mix | None:
        """The mix that a row can wear as well; None of a `DerivedType`."""
        if self.combination_type not in get_args(CombinationType):
            return None
        weights = None if self.weights is None else self.used_weights
        return Mix(tuple(self.adapters), weights, self.combination_type)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The combination as errors and reports name it: `ties of a and b`."""
        return f"{self.combination_type} of {' and '.join(self.adapters)}"
