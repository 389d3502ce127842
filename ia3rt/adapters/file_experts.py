"""Vectors of single experts in files that are combined without their model, which may have one tensor for all."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ia3rt.adapters.checkpoint import Checkpoint
from ia3rt.adapters.combining.combination import Combination

_SINGLE = re.compile(r"(.+\.)?experts\.\d+\..+")
_WHOLE = re.compile(r"(.+\.)?experts\.(?!\d+\.).+")


def check_experts(checkpoints: Mapping[str, Checkpoint], combination: Combination) -> None:
    """Checks that files give what a model would, where some have a vector for each expert's own matrices.

    A transformers before 5 had these as layers, and today's has them as one tensor, a site for all: which tensor, and
    in which order, is known with the model. What is made number by number is the same without.

    Args:
        checkpoints: by the names that `combination` has.
        combination: how they are to be combined.

    Raises:
        ValueError: the combination is one of whole vectors, or another file has vectors of all experts.
    """
    singles, wholes = _sites(checkpoints, _SINGLE), _sites(checkpoints, _WHOLE)
    if not singles:
        return
    (name, path), *_ = singles.items()
    why = (
        f"adapter {name!r} has vectors of single experts ({path!r}), which an earlier transformers kept apart, and "
        "which of them are one tensor today is known with the model only"
    )
    how = "combine them there: ia3rt.patch(model), load_adapter(…), add_weighted_adapter(…), save_adapter(…)"
    if combination.is_of_whole_vectors:
        raise ValueError(f"{combination} takes a site's vector as a whole, but {why}: {how}")
    if wholes and len({*singles, *wholes}) > 1:
        (other, whole), *_ = wholes.items()
        raise ValueError(f"{why}, while adapter {other!r} has one of all of them ({whole!r}): {how}")


def _sites(checkpoints: Mapping[str, Checkpoint], of: re.Pattern[str]) -> dict[str, str]:
    """By the name of each adapter that has such sites, the path of the first."""
    paths = {name: [path for path, _ in each.vectors if of.fullmatch(path)] for name, each in checkpoints.items()}
    return {name: found[0] for name, found in paths.items() if found}
