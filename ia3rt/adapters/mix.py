"""What a row of the batch wears: a combination of adapters."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from ia3rt.adapters.shortened import short

K = TypeVar("K", str, int)
CombinationType: TypeAlias = Literal["product", "linear", "delta"]


@dataclass(frozen=True)
class Mix:
    """A combination of adapters, each vector l_j with a weight w_j, evaluated site by site.

    - `product`, s = Π l_j: what having all the adapters active at once means in PEFT. It takes no weights.
    - `linear`, s = Σ w_j l_j: PEFT's `add_weighted_adapter`, another thing than having them active at once. A site
      that an adapter lacks counts as ones; one where none of them acts stays as it is.
    - `delta`, s = 1 + Σ w_j (l_j - 1): task arithmetic (Ilharco et al. 2023) around the unadapted model.

    Attributes:
        adapters: the adapters' names; none is the base model.
        weights: one finite number an adapter for `linear` and `delta`; None or all ones for `product`.
        combination_type: how they combine.

    Raises:
        ValueError: an unknown combination type, missing or superfluous weights, weights of another length than
            adapters, a weight that is no number or not finite, or a weighted mix of no adapters.
        TypeError: adapters or weights that are no sequence.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    combination_type: CombinationType = "product"

    def __post_init__(self) -> None:
        """Normalises sequences to tuples and checks what the class promises."""
        if isinstance(self.adapters, str):
            raise ValueError(f"adapters must be a sequence of names, got the string {self.adapters!r}")
        if not isinstance(self.adapters, Iterable):
            raise TypeError(f"adapters must be a sequence of names, got {short(repr(self.adapters))}")
        object.__setattr__(self, "adapters", tuple(self.adapters))
        for name in self.adapters:
            if not isinstance(name, str):
                raise ValueError(f"adapters must be names, and {short(repr(name))} is none")
        object.__setattr__(self, "weights", as_weights(self.adapters, self.weights))
        if self.combination_type not in get_args(CombinationType):
            known = ", ".join(repr(kind) for kind in get_args(CombinationType))
            raise ValueError(
                f"unknown combination_type {self.combination_type!r}: use one of {known}. "
                "Others, such as 'ties', make an adapter of its own: rt.add_weighted_adapter(…)"
            )
        self._check_weights()

    def _check_weights(self) -> None:
        if self.combination_type == "product":
            if self.weights is not None and any(weight != 1.0 for weight in self.weights):
                raise ValueError(
                    "a product takes no weights: scaling one factor scales them all, whichever it is, since the order "
                    'of factors does not matter. Use "linear" for a weighted sum or "delta" to weaken an adapter'
                )
            object.__setattr__(self, "weights", None)
        elif self.weights is None:
            raise ValueError(f"a {self.combination_type} mix needs weights, one for each of {list(self.adapters)}")
        elif not self.adapters:
            raise ValueError(f"a {self.combination_type} mix needs at least one adapter")

    @classmethod
    def of(cls, spec: MixLike) -> Mix:
        """The mix that a user's shorthand means.

        Args:
            spec: a name, None for the base model, a list of names for their product, {name: weight} for their
                weighted sum, plain data as `of_data` takes it, or a Mix.

        Raises:
            ValueError: an empty list or mapping, or what Mix itself refuses.
            TypeError: anything else.
        """
        if isinstance(spec, Mix):
            return spec
        if spec is None:
            return BASE
        if isinstance(spec, str):
            return named(spec)
        if isinstance(spec, Mapping):
            if any(isinstance(spec.get(field), Sequence) for field in _FIELDS):  # and no weight of such an adapter
                return cls.of_data(spec)
            return cls(tuple(spec), tuple(spec.values()), "linear")
        if isinstance(spec, Sequence) and all(isinstance(name, str) for name in spec):
            if not spec:
                raise ValueError("an empty list of adapters: use None for the base model")
            return _product(tuple(spec))
        raise TypeError(
            f"{spec!r} is no mix: give an adapter's name, None, a list of names, a mapping of name to weight, or a Mix"
        )

    @classmethod
    def of_data(cls, data: object, what: str = "a mix", fields: tuple[str, str, str] | None = None) -> Mix:
        """The mix that plain data means, as JSON brings it: `{"adapters": ["a", "b"], "weights": [0.7, 0.3],
        "combination_type": "linear"}`.

        Args:
            data: adapters are names, and no text that means a mix. Without weights and combination_type it is their
                product.
            what: what to call it in errors.
            fields: other names for the three fields, in this order.

        Raises:
            ValueError: it has another shape, or is what Mix itself refuses.
        """
        names, numbers, kind = fields or _FIELDS
        if not isinstance(data, Mapping):
            raise ValueError(f"{what} must be an object with {names}, {numbers} and {kind}, not {short(data)}")
        unknown = sorted(map(str, set(data) - {names, numbers, kind}))
        if unknown:
            raise ValueError(f"{what} has no field {short(unknown[0])!r}: it takes {names}, {numbers} and {kind}")
        adapters, weights, combination_type = data.get(names), data.get(numbers), data.get(kind, "product")
        if not _is_list_of(str, adapters) or not adapters or not all(adapters):
            raise ValueError(f"{what}: {names} must be a list of adapters' names, not {short(adapters)}")
        if not isinstance(combination_type, str) or combination_type not in get_args(CombinationType):
            known = ", ".join(get_args(CombinationType))
            raise ValueError(f"{what}: {kind} {short(repr(combination_type))} is not known: use one of {known}")
        if weights is not None and not _are_finite(weights):
            raise ValueError(f"{what}: {numbers} must be a list of finite numbers, not {short(weights)}")
        if weights is not None and len(weights) != len(adapters):
            raise ValueError(f"{what} has {len(weights)} {numbers} for {len(adapters)} {names}: give each one")
        try:
            return cls(tuple(adapters), weights, combination_type)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None

    def __str__(self) -> str:
        """The mix as a formula: `a * b`, `0.7 a + 0.3 b`, `1 + 0.5 (a - 1)`, `base`."""
        if self.weights is None:
            return " * ".join(self.adapters) or "base"
        if self.combination_type == "linear":
            return " + ".join(f"{weight:g} {name}" for name, weight in zip(self.adapters, self.weights, strict=True))
        return "1 + " + " + ".join(
            f"{weight:g} ({name} - 1)" for name, weight in zip(self.adapters, self.weights, strict=True)
        )


def as_weights(adapters: Sequence[str], given: Any) -> tuple[float, ...] | None:
    """Weights as floats, one for each adapter; None where none are given.

    Raises:
        TypeError: they are no sequence.
        ValueError: they are not one for each, or one is no number or not finite.
    """
    if given is None:
        return None
    if isinstance(given, str | bytes | Set) or not isinstance(given, Iterable):
        raise TypeError(
            f"weights must be a sequence of numbers, one for each of {list(adapters)}, got {short(repr(given))}"
        )
    weights = tuple(given)
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters {list(adapters)}: give each one")
    return tuple(map(_as_weight, adapters, weights))


def added_up(terms: Iterable[tuple[K, float]]) -> dict[K, float]:
    """The terms of a sum in order, each once: weights of one and the same add up."""
    weights: dict[K, float] = {}
    for term, weight in sorted(terms):
        weights[term] = weights.get(term, 0.0) + weight
    return weights


def _as_weight(name: str, given: Any) -> float:
    weight = None
    if not isinstance(given, str | bytes | bool):
        with suppress(TypeError, ValueError, OverflowError):
            weight = float(given)
    if weight is None:
        raise ValueError(f"the weight of adapter {name!r} is {short(repr(given))}: weights are numbers")
    if not math.isfinite(weight):
        raise ValueError(f"the weight of adapter {name!r} is {weight}: weights must be finite")
    return weight


def _is_list_of(kind: Any, given: object) -> bool:
    """Whether it is a list of these; True and False are no numbers."""
    return isinstance(given, list | tuple) and all(isinstance(x, kind) and not isinstance(x, bool) for x in given)


def _are_finite(given: Any) -> bool:
    try:
        return _is_list_of(int | float, given) and all(map(math.isfinite, given))
    except OverflowError:  # an integer that no float holds
        return False


_FIELDS = ("adapters", "weights", "combination_type")
MixLike: TypeAlias = "Mix | str | Sequence[str] | Mapping[str, Any] | None"
BASE = Mix(())


@functools.lru_cache(1024)
def _product(names: tuple[str, ...]) -> Mix:
    return Mix(names)


@functools.lru_cache(1024)
def named(name: str) -> Mix:
    """The mix of one adapter."""
    # Checking a mix takes a tenth of switching to it, and most switches are to one of a few adapters.
    return Mix((name,))
