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
    single = _first(checkpoints, _SINGLE)
    if single is None:
        return
    name, path = single
    why = (
        f"adapter {name!r} has vectors of single experts ({path!r}), which an earlier transformers kept apart, and "
        "which of them are one tensor today is known with the model only"
    )
    how = "combine them there: ia3rt.patch(model), load_adapter(…), add_weighted_adapter(…), save_adapter(…)"
    if combination.is_of_whole_vectors:
        raise ValueError(f"{combination} takes a site's vector as a whole, but {why}: {how}")
    whole = _first({other: each for other, each in checkpoints.items() if other != name}, _WHOLE)
    if whole is not None:
        raise ValueError(f"{why}, while adapter {whole[0]!r} has one of all of them ({whole[1]!r}): {how}")


def _first(checkpoints: Mapping[str, Checkpoint], of: re.Pattern[str]) -> tuple[str, str] | None:
    """The first adapter with such a site, and the site's path."""
    paths = ((name, path) for name, each in checkpoints.items() for path, _ in each.vectors)
    return next(((name, path) for name, path in paths if of.fullmatch(path)), None)
