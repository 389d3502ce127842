"""The vectors of an adapter that is derived from resident ones, site by site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.combining.arithmetic import analogy, negate
from ia3rt.adapters.combining.combination import Combination
from ia3rt.adapters.combining.fisher import fisher
from ia3rt.adapters.combining.max_abs import max_abs
from ia3rt.adapters.combining.power import power
from ia3rt.adapters.combining.pruned_sums import dare_linear, magnitude_prune
from ia3rt.adapters.combining.slerp import slerp
from ia3rt.adapters.combining.ties import dare_ties, ties
from ia3rt.adapters.given import check_floating
from ia3rt.adapters.site import Site, SiteKey

Importances = Mapping[str, Mapping[SiteKey, Tensor]]
"""By adapter: at each of its sites how important each of its numbers is, in the shape of the vector; see `fisher`."""

_SUBTRACTING = ("negate", "analogy")


def derived_vectors(
    bank: Bank, adapters: Sequence[Adapter], combination: Combination, importances: Importances | None = None
) -> dict[Site, Tensor]:
    """What a combination makes of adapters, at each site where one of them acts.

    Args:
        bank: where they are resident.
        adapters: in the order of `combination.adapters`.
        combination: of a `DerivedType`.
        importances: for `fisher`, and for it alone.

    Returns:
        float32 [width] on the CPU; [width_of_one] at experts where none of them has a vector for each.

    Raises:
        ValueError: importances are missing, too many or no importances; adapters cannot be combined so at a site; or
            modules of their own would have to be negated.
    """
    _check_own_modules(adapters, combination)
    _check_importances(adapters, combination, importances)
    held = [_on_the_cpu(bank, adapter) for adapter in adapters]
    derived: dict[Site, Tensor] = {}
    for site in bank.sites.values():
        given = [vectors.get(site) for vectors in held]
        numbers = max((vector.numel() for vector in given if vector is not None), default=0)
        if not numbers:
            continue
        ones = torch.ones(numbers, dtype=torch.float32, device="cpu")
        vectors = [ones if vector is None else _whole(vector, numbers) for vector in given]
        weighed = [_importance(name, site, importances, numbers) for name in combination.adapters]
        keys = [f"{combination.seed or 0}:{place}:{site.side}:{site.path}" for place in range(len(adapters))]
        try:
            derived[site] = _function(combination, keys, weighed)(vectors)
        except ValueError as error:
            raise ValueError(f"{combination} is not possible at {site}: {error}") from None
    return derived


def _on_the_cpu(bank: Bank, adapter: Adapter) -> dict[Site, Tensor]:
    """As `Bank.distinct`, copied in one piece from each device: from a GPU each copy is a wait."""
    columns = bank.by_site(lambda here: torch.split(here.table[adapter.row].cpu(), here.widths))
    return {
        site: column[: site.width_of_one] if site in adapter.shared else column
        for site, column in zip(bank.sites.values(), columns, strict=True)
        if site in adapter.sites
    }


def _function(
    combination: Combination, keys: Sequence[str], importances: Sequence[Tensor | None]
) -> Callable[[Sequence[Tensor]], Tensor]:
    weights, density = combination.used_weights, combination.density or 1.0
    sign = combination.majority_sign_method
    functions: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
        "power": lambda vectors: power(vectors, weights),
        "ties": lambda vectors: ties(vectors, weights, density, sign),
        "dare_linear": lambda vectors: dare_linear(vectors, weights, density, keys),
        "dare_ties": lambda vectors: dare_ties(vectors, weights, density, sign, keys),
        "magnitude_prune": lambda vectors: magnitude_prune(vectors, weights, density),
        "max_abs": lambda vectors: max_abs(vectors, weights),
        "fisher": lambda vectors: fisher(vectors, importances, weights),
        "negate": lambda vectors: negate(vectors[0], weights[0]),
        "analogy": lambda vectors: analogy(vectors, weights),
        "slerp": lambda vectors: slerp(vectors, weights),
    }
    return functions[combination.combination_type]


def _whole(vector: Tensor, numbers: int) -> Tensor:
    """A vector that experts share, once for each of them, where another adapter has one for each."""
    return vector if vector.numel() == numbers else vector.repeat(numbers // vector.numel())


def _importance(name: str, site: Site, importances: Importances | None, numbers: int) -> Tensor | None:
    given = (importances or {}).get(name, {}).get(site.key)
    return None if given is None else _whole(given.reshape(-1), numbers)


def _check_own_modules(adapters: Sequence[Adapter], combination: Combination) -> None:
    for adapter in adapters:
        if adapter.modules and combination.combination_type in _SUBTRACTING:
            raise ValueError(
                f"adapter {adapter.name!r} has its own {sorted(adapter.modules)}, which {combination} would have to "
                "negate, and a module is not: combine adapters of vectors alone"
            )


def _check_importances(adapters: Sequence[Adapter], combination: Combination, importances: Importances | None) -> None:
    if combination.combination_type != "fisher":
        if importances is not None:
            raise ValueError(f"{combination.combination_type!r} takes no importances, which are for 'fisher'")
        return
    if importances is None:
        raise ValueError("'fisher' needs importances: for each adapter one for each of its vectors")
    strange = sorted(importances.keys() - {adapter.name for adapter in adapters})
    if strange:
        raise ValueError(f"importances are given for {strange}, which {combination} does not combine")
    for adapter in adapters:
        given = importances.get(adapter.name, {})
        sites = {site.key: site for site in adapter.sites}
        for key in given.keys() - sites.keys():
            raise ValueError(f"importances are given for {key} of adapter {adapter.name!r}, which does not act there")
        for key, site in sites.items():
            if key not in given:
                raise ValueError(
                    f"adapter {adapter.name!r} has no importances at {site}: give them for all its vectors"
                )
            check_floating(given[key], f"the importance of adapter {adapter.name!r} at {site}")
            width = site.width_of_one if site in adapter.shared else site.width
            if given[key].numel() != width:
                raise ValueError(
                    f"adapter {adapter.name!r} has importances of shape {tuple(given[key].shape)} at {site}: expected "
                    f"{width} numbers"
                )
            if not (given[key].isfinite() & (given[key] >= 0)).all():
                raise ValueError(f"adapter {adapter.name!r} has importances at {site} that are negative, NaN or inf")
