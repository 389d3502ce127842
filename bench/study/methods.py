"""The ways of combining that are compared, each over ia3rt's public API, and which values of each are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from ia3rt.adapters.site import SiteKey
from ia3rt.runtime import Runtime

Values = Mapping[str, float]
"""A method's options: `weight`, the same for each adapter, and `density`."""

WEIGHTS = (0.2, 0.35, 0.5, 0.7, 0.85, 1.0)
DENSITIES = (0.1, 0.2, 0.4)
STRONG = (0.7, 1.0, 1.5)  # for what averages or leaves most out

BySite = Mapping[SiteKey, Tensor]


@dataclass(frozen=True)
class Combining:
    """What a method may use.

    Attributes:
        rt: the runtime that has the adapters.
        names: of the adapters to combine.
        fisher: importances by adapter.
        squares: E[h²] by adapter.
    """

    rt: Runtime
    names: Sequence[str]
    fisher: Mapping[str, BySite] = field(default_factory=dict)
    squares: Mapping[str, BySite] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way of combining.

    Attributes:
        name: what it is called; of a combination_type, its name.
        combine: adds the combination as an adapter of the name that is given.
        grid: the values that are tried on validation texts; one where there is nothing to choose.
        only: the number of adapters that it takes; None takes any.
    """

    name: str
    combine: Callable[[Combining, str, Values], None]
    grid: tuple[Values, ...] = ({},)
    only: int | None = None

    def takes(self, count: int) -> bool:
        """Whether it can combine as many adapters."""
        return self.only in (None, count)


def weighted(kind: str) -> Callable[[Combining, str, Values], None]:
    """A combination_type with one weight for all, and a density where it has one."""

    def combine(given: Combining, name: str, values: Values) -> None:
        weights = [values["weight"]] * len(given.names)
        given.rt.add_weighted_adapter(given.names, weights, name, kind, density=values.get("density"))  # type: ignore[arg-type]

    return combine


def as_product(given: Combining, name: str, values: Values) -> None:
    """Π l: what several active adapters mean."""
    given.rt.add_weighted_adapter(given.names, None, name, "product")


def as_mean(given: Combining, name: str, values: Values) -> None:
    """Σ l / n: `linear` with weights that sum to 1."""
    given.rt.add_weighted_adapter(given.names, [1.0] * len(given.names), name, "linear", normalize=True)


def as_arc(given: Combining, name: str, values: Values) -> None:
    """Halfway along the arc between two."""
    given.rt.add_weighted_adapter(given.names, [0.5, 0.5], name, "slerp")


def by_fisher(given: Combining, name: str, values: Values) -> None:
    """Σ F l / Σ F."""
    chosen = {each: given.fisher[each] for each in given.names}
    given.rt.add_weighted_adapter(given.names, None, name, "fisher", importances=chosen)


def lerp_product(given: Combining, name: str, values: Values) -> None:
    """Π (1 + w (l - 1)): the product of adapters that are each weakened first."""
    given.rt.add_adapter(name, _by_site(given, lambda key, ls: (1 + values["weight"] * (ls - 1)).prod(0)))


def activation_weighted(given: Combining, name: str, values: Values) -> None:
    """Σ E[h²] l / Σ E[h²]: the one vector that errs least, in squares, from each adapter's on what it scales.

    It is what regression mean (Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models")
    comes to where weights are a diagonal.
    """

    def mean(key: SiteKey, vectors: Tensor) -> Tensor:
        squares = torch.stack([given.squares[each][key] for each in given.names]).double()
        return (squares * vectors).sum(0) / squares.sum(0).clamp(min=torch.finfo(torch.float64).tiny)

    given.rt.add_adapter(name, _by_site(given, mean))


def _by_site(given: Combining, formula: Callable[[SiteKey, Tensor], Tensor]) -> dict[SiteKey, Tensor]:
    """A formula of the adapters' vectors at each site, float64 [adapters, width], rounded once."""
    held = [given.rt.get_adapter(each).vectors for each in given.names]
    return {key: formula(key, torch.stack([each[key].double() for each in held])).float() for key in held[0]}


def _grid(weights: Sequence[float], densities: Sequence[float] = ()) -> tuple[Values, ...]:
    if not densities:
        return tuple({"weight": weight} for weight in weights)
    return tuple({"density": density, "weight": weight} for density, weight in product(densities, weights))


METHODS = (
    Method("product", as_product),
    Method("linear", as_mean),
    Method("delta", weighted("delta"), _grid(WEIGHTS)),
    Method("power", weighted("power"), _grid(WEIGHTS[1:5])),  # 1 is the product
    Method("lerp_product", lerp_product, _grid(WEIGHTS[1:5])),
    Method("magnitude_prune", weighted("magnitude_prune"), _grid(STRONG, DENSITIES)),
    Method("ties", weighted("ties"), _grid(STRONG, DENSITIES)),
    Method("dare_linear", weighted("dare_linear"), _grid((0.35, 0.7, 1.0), (0.5, 0.8))),
    Method("dare_ties", weighted("dare_ties"), _grid(STRONG, (0.5, 0.8))),
    Method("max_abs", weighted("max_abs"), _grid((0.5, 0.7, 1.0, 1.5))),
    Method("fisher", by_fisher),
    Method("activation_weighted", activation_weighted),
    Method("slerp", as_arc, only=2),
)
"""All that are compared; `product` first, which the others are compared with."""

IN_A_ROW = ("product", "delta", "linear")
"""What a row can wear as a `Mix`, without an adapter of its own: shown where there is no room for all."""

DEFAULTS: Mapping[str, tuple[Values, Values]] = {
    "delta": ({"weight": 1.0}, {"weight": 0.85}),
    "magnitude_prune": ({"density": 0.2, "weight": 1.0}, {"density": 0.4, "weight": 1.0}),
    "ties": ({"density": 0.2, "weight": 1.0}, {"density": 0.4, "weight": 1.0}),
    "dare_ties": ({"density": 0.5, "weight": 1.0}, {"density": 0.8, "weight": 1.0}),
}
"""Which of two values would be the better default: what is usual, and what was best on validation texts where one value
serves both models and all numbers of adapters."""

SUM_OF_ONES = Method("linear, weights of 1", lambda given, name, _: weighted("linear")(given, name, {"weight": 1.0}))
"""What goes wrong: Σ l is about n, and not about 1. Once, as a warning."""
