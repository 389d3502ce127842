"""The vectors of an adapter that is made of others: a mix as rows wear it, or one that is derived."""

from __future__ import annotations

from torch import Tensor

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.combining.combination import Combination
from ia3rt.adapters.combining.derive import Importances, derived_vectors
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.resolved import ResolvedMix
from ia3rt.adapters.site import Site
from ia3rt.routing.composed import composed_vectors


def combined_vectors(
    bank: Bank, combination: Combination, importances: Importances | None = None
) -> dict[Site, Tensor]:
    """What a combination makes of resident adapters, float32, at each site where one of them acts.

    Args:
        bank: where they are resident.
        combination: what to make. A `Mix`'s numbers are those that rows wear, to the bit.
        importances: for `fisher`, and for it alone.

    Raises:
        ValueError: an adapter is unknown, two bring their own of one module, what they give is too large for float32,
            or as `derived_vectors`.
    """
    mix = combination.mix
    resolved = bank.resolve(Mix(tuple(combination.adapters)) if mix is None else mix)
    if mix is None:
        vectors = derived_vectors(bank, resolved.adapters, combination, importances)
    elif importances is not None:
        raise ValueError(f"{combination.combination_type!r} takes no importances, which are for 'fisher'")
    else:
        vectors = {site: _distinct(site, each, resolved) for site, each in composed_vectors(bank, resolved).items()}
    for site, vector in vectors.items():
        if not vector.isfinite().all():
            raise ValueError(f"{combination} is too large for float32 at {site}: give smaller weights")
    return vectors


def _distinct(site: Site, vector: Tensor, mix: ResolvedMix) -> Tensor:
    """A composed vector without repeating: [width_of_one] at experts where each adapter that acts has one for all."""
    is_shared = all(site in adapter.shared for adapter in mix.adapters if site in adapter.sites)
    return vector[: site.width_of_one] if site.experts and is_shared else vector
