"""An adapter's vectors as one row of a bank, and what of them no row can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ia3rt.adapters.given import check_floating
from ia3rt.adapters.pieces import pieces
from ia3rt.adapters.site import Site, SiteKey


def pack(name: str, vectors: Mapping[Site, Tensor], sites: Mapping[SiteKey, Site], dtype: torch.dtype) -> Tensor:
    """Lays an adapter's vectors out as a row of its own: float32, on the CPU, ones where it has no vector.

    Args:
        name: the adapter's, for errors.
        vectors: its numbers, [width] in any shape, at experts also [experts, width_of_one] or [width_of_one] for all.
        sites: the bank's columns. Sites that it lacks come after them, in the order of `vectors`.
        dtype: the bank's.

    Raises:
        ValueError: a vector of another width than its site's, of other than floating point numbers, without numbers of
            its own, with a NaN or inf or a number too large for the dtype, or with other numbers than ones outside of
            its site's slices; or nothing to load.
    """
    if not vectors:
        raise ValueError(f"adapter {name!r} has no vectors")
    for site, vector in vectors.items():
        check_floating(vector, f"the vector of adapter {name!r} at {site}")
        if vector.layout != torch.strided or vector.is_meta:
            how = "without numbers, on the meta device" if vector.is_meta else f"of layout {vector.layout}"
            raise ValueError(f"adapter {name!r} has a vector {how} at {site}: expected a plain tensor of its numbers")
        if not _fits(vector, site):
            raise ValueError(
                f"adapter {name!r} has a vector of shape {tuple(vector.shape)} at {site}: expected "
                f"{_numbers(site)}. It was made for a model of another size"
            )
        _check_slices(name, site, vector)
    laid = all_sites(sites, vectors).values()
    row = torch.empty(sum(site.width for site in laid), dtype=torch.float32, device="cpu")
    for site, columns in zip(laid, torch.split(row, [site.width for site in laid]), strict=True):
        if site in vectors:
            columns.view(site.experts or 1, -1).copy_(vectors[site].detach().reshape(-1, site.width_of_one))
        else:
            columns.fill_(1.0)
    if not all(piece.to(dtype).isfinite().all() for piece in pieces(row)):
        for site, vector in vectors.items():
            _check_held(name, site, vector, dtype)
    return row


def all_sites(sites: Mapping[SiteKey, Site], more: Iterable[Site]) -> dict[SiteKey, Site]:
    """A bank's sites and then those of `more` that it lacks."""
    return {**sites, **{site.key: site for site in more if site.key not in sites}}


def _check_held(name: str, site: Site, vector: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where a vector has a number that no bank can hold, or not one of this dtype."""
    numbers = vector.detach().double()
    if not numbers.isfinite().all():
        raise ValueError(f"adapter {name!r} has a NaN or inf at {site}: its training diverged or the file is damaged")
    row = numbers.float()
    if not row.to(dtype).isfinite().all():
        holds_it = "patch(dtype=torch.float32) holds it" if row.isfinite().all() else "no dtype of a bank's holds it"
        raise ValueError(
            f"adapter {name!r} has a number of magnitude {numbers.abs().max():g} at {site}, which is too large for the "
            f"bank's {dtype}: {holds_it}"
        )


def _check_slices(name: str, site: Site, vector: Tensor) -> None:
    """Raises ValueError where a vector acts outside of the part of a site that `patch` was told of."""
    if site.slices is None:
        return
    others = site.slices.outside(site.width)
    outside = others[vector.detach().reshape(-1)[others.to(vector.device)].cpu() != 1.0]
    if len(outside):
        raise ValueError(
            f"adapter {name!r} scales more of {site.path!r} than {' and '.join(site.slices.names)}, which is what "
            f"patch(target_modules=…) says of it: {len(outside)} of the {len(others)} other numbers are not 1, the "
            f"first that of column {outside[0].item()}. To wear it, patch() with None there, for the whole module"
        )


def _fits(vector: Tensor, site: Site) -> bool:
    """Whether a vector, in any shape, is one for a site: for all experts there, for each of them, or a layer's."""
    *above, last = [size for size in vector.shape if size != 1] or [1]
    if site.experts and (above or last != site.width):
        return [*above, last] in ([site.width_of_one], [site.experts, site.width_of_one])
    return not above and last == site.width


def _numbers(site: Site) -> str:
    if not site.experts:
        return f"{site.width} numbers"
    return f"[{site.experts}, {site.width_of_one}], or [{site.width_of_one}] for all experts alike"
