"""Adapters without their model: the sites where they act, as far as their files say, and a bank of these."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.checkpoint import Checkpoint
from ia3rt.adapters.file_modules import own_modules
from ia3rt.adapters.site import Site, SiteKey


def file_sites(checkpoints: Mapping[str, Checkpoint]) -> dict[SiteKey, Site]:
    """The sites of adapters of one model, by what shapes say: experts and convolutions are known by theirs.

    Args:
        checkpoints: by a name each, for errors.

    Raises:
        ValueError: two of them have vectors of different shapes at one site, so that they are of different models.
    """
    sites: dict[SiteKey, Site] = {}
    first: dict[SiteKey, str] = {}
    for name, checkpoint in checkpoints.items():
        for key, vector in checkpoint.vectors.items():
            site = _site(key, vector)
            known = sites.setdefault(key, site)
            first.setdefault(key, name)
            # One vector for all experts looks like a layer's: the one that has a vector for each knows how many.
            if (known.width_of_one, known.spatial) != (site.width_of_one, site.spatial) or (
                known.experts and site.experts and known.experts != site.experts
            ):
                raise ValueError(
                    f"adapters {first[key]!r} and {name!r} are of different models: at {key[0]!r} ({key[1]}put) one "
                    f"has a vector of shape {tuple(checkpoints[first[key]].vectors[key].shape)}, the other of "
                    f"{tuple(vector.shape)}"
                )
            if site.experts and not known.experts:
                sites[key], first[key] = site, name
    return sites


def bank_of_files(checkpoints: Mapping[str, Checkpoint]) -> Bank:
    """The adapters, each by its name, in a bank on the CPU, float32.

    Raises:
        ValueError: as `file_sites`, `own_modules` and `check_finite`.
    """
    for name, checkpoint in checkpoints.items():
        check_finite(name, checkpoint)
    sites, own = file_sites(checkpoints), own_modules(checkpoints)
    bank = Bank(sites.values(), torch.device("cpu"), torch.float32, len(checkpoints))
    for name, checkpoint in checkpoints.items():
        vectors = {sites[key]: vector for key, vector in checkpoint.vectors.items()}
        bank.add(name, vectors, dict(checkpoint.config), own[name], checkpoint.unnamed & own[name])
    return bank


def check_finite(name: str, checkpoint: Checkpoint) -> None:
    """Checks that all of an adapter's numbers are some, those of its own modules too.

    Args:
        name: the adapter's, for the error.
        checkpoint: the adapter.

    Raises:
        ValueError: one is NaN or inf.
    """
    for (path, side), vector in checkpoint.vectors.items():
        if not finite(vector).all():
            raise ValueError(
                f"adapter {name!r} has a NaN or inf at {path} ({side}put): its training diverged or the file is damaged"
            )
    for path, state in checkpoint.modules.items():
        for each, tensor in state.items():
            if not finite(tensor).all():
                raise ValueError(
                    f"adapter {name!r} has a NaN or inf in {each!r} of its own module {path!r}: its training diverged "
                    "or the file is damaged"
                )


def finite(tensor: Tensor) -> Tensor:
    """Which numbers are neither NaN nor inf, of any dtype: torch does not tell of those of eight bits."""
    is_small = tensor.is_floating_point() and tensor.element_size() == 1
    return (tensor.float() if is_small else tensor).isfinite()


def _site(key: SiteKey, vector: Tensor) -> Site:
    if vector.dim() == 3 and len(vector) > 1:
        return Site(*key, vector.numel(), len(vector), key[0].rpartition(".")[2])
    return Site(*key, vector.numel(), spatial=max(vector.dim() - 2, 0))
