"""Which modules are an adapter's own by its files, where there is no model to compare their weights with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ia3rt.adapters.checkpoint import Checkpoint


def own_modules(checkpoints: Mapping[str, Checkpoint]) -> dict[str, frozenset[str]]:
    """The paths of each adapter's own modules, without those that are the model's.

    Weights that modules_to_save does not name are the model's where the adapter has a vector for them, as PEFT saves
    those of a target `lm_head`; and where adapters come with the same, the first alone counts as bringing them.

    Args:
        checkpoints: by a name each, for errors; of one model.

    Raises:
        ValueError: two have a vector for a module and other weights of it, so that they are of different models.
    """
    models: dict[str, tuple[str, Mapping[str, Tensor]]] = {}
    for name, checkpoint in checkpoints.items():
        for path in checkpoint.unnamed & {path for path, _ in checkpoint.vectors}:
            first, state = models.setdefault(path, (name, checkpoint.modules[path]))
            if not _are_same(state, checkpoint.modules[path]):
                raise ValueError(
                    f"adapters {first!r} and {name!r} are of different models: both have a vector at {path!r}, and "
                    "the model's weights there, which were saved beside it, differ"
                )
    own = {}
    for name, checkpoint in checkpoints.items():
        known = checkpoint.unnamed & models.keys()
        same = {path for path in known if _are_same(models[path][1], checkpoint.modules[path])}
        own[name] = frozenset(checkpoint.modules.keys() - same)
        for path in checkpoint.unnamed - known:
            models[path] = name, checkpoint.modules[path]
    return own


def _are_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether these are the same numbers, as far as the coarser of their dtypes tells."""
    return one.keys() == other.keys() and all(
        torch.equal(each.to(other[name].dtype), other[name]) or torch.equal(each, other[name].to(each.dtype))
        for name, each in one.items()
    )
