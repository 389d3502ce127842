"""Vectors of checkpoints that name a model's modules as an earlier transformers did: an expert's, one by one."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ia3rt.adapters.site import Side, Site, SiteKey
from ia3rt.modules.experts_forms import expert_sites


def by_todays_names(model: nn.Module, vectors: Mapping[SiteKey, Tensor]) -> dict[SiteKey, Tensor]:
    """Vectors by the names that the model has now, which transformers' own conversion of weights gives.

    What it makes of the weights of all experts, one tensor, it makes of their vectors, which are weights of one row or
    one column. Experts without a vector get ones.

    Args:
        model: the model.
        vectors: as in `Checkpoint`. Those at names that the model has, or that no conversion knows, stay as they are.

    Raises:
        ValueError: two vectors mean the same place.
    """
    modules = dict(model.named_modules())
    sites = expert_sites(modules)
    found = {key: vector for key, vector in vectors.items() if key[0] in modules or key[0] in sites}
    if len(found) == len(vectors) or "transformers" not in sys.modules:
        return dict(vectors)
    renamings, converters = _conversions(model)
    collected: dict[SiteKey, tuple[Any, dict[str, dict[int, Tensor]]]] = {}
    for (path, side), vector in vectors.items():
        if (path, side) in found:
            continue
        key = f"{path}.weight"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        todays, pattern, converter = key, None, None
        for converter in converters:
            todays, pattern = converter.rename_source_key(key)
            if pattern is not None:
                break
        if pattern is None or todays not in sites:
            renamed = key.removesuffix(".weight")
            _put(found, (renamed if renamed in modules else path, side), vector)
            continue
        number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
        by_pattern = collected.setdefault((todays, side), (converter, {}))[1]
        if number is None or int(number[1]) >= sites[todays].experts:
            raise ValueError(f"a vector is at {path!r}, but {todays!r} has {sites[todays].experts} experts")
        by_pattern.setdefault(pattern, {})[int(number[1])] = vector
    for (path, side), (converter, by_pattern) in collected.items():
        _put(found, (path, side), _as_one(model, sites[path], side, converter, by_pattern))
    return found


def _conversions(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Transformers' for the model: those that give a weight another name, and those that make one of several."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:  # before version 5 there was nothing to convert
        return [], []
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    return renamings, [each for each in transforms if isinstance(each, WeightConverter)]


def _as_one(
    model: nn.Module, site: Site, side: Side, converter: Any, by_pattern: Mapping[str, Mapping[int, Tensor]]
) -> Tensor:
    """The vectors [experts, …] of a site, of those of single experts by what a converter calls their matrices."""
    count = len(converter.source_patterns)
    width = site.width_of_one // count
    shape = (1, width) if side == "in" else (width, 1)
    parts: dict[str, Any] = {}
    for pattern in converter.source_patterns:
        own = by_pattern.get(pattern, {})
        for vector in own.values():
            if tuple(vector.shape) != shape:
                raise ValueError(
                    f"an expert's vector for {site} has shape {tuple(vector.shape)}: expected {shape}. It was made "
                    "for a model of another size, or acts at the other side, where experts wear none"
                )
        ones = torch.ones(shape, dtype=torch.float32, device="cpu")
        parts[pattern] = [own.get(expert, ones) for expert in range(site.experts)]
    for operation in converter.operations:
        parts = operation.convert(
            parts,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=site.path,
            model=model,
            config=getattr(model, "config", None),
        )
    (made,) = parts.values()
    whole: Tensor = made[0] if isinstance(made, list) else made
    return whole


def _put(vectors: dict[SiteKey, Tensor], key: SiteKey, vector: Tensor) -> None:
    if key in vectors:
        raise ValueError(f"two vectors are for the {key[1]}put of {key[0]!r}, by an earlier name and by today's")
    vectors[key] = vector
