"""Mixes as a request's body gives them, in the shape of LoRAX's `merged_adapters`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ia3rt.adapters.mix import CombinationType, Mix
from ia3rt.serving.vllm.names import MixNameError, check_name, check_size, short

FIELD = "merged_adapters"
_STRATEGIES: dict[str, CombinationType] = {"linear": "linear", "product": "product", "delta": "delta"}
_KEYS = {"ids", "weights", "merge_strategy"}


def read_merged_adapters(body: Any) -> Mix:
    """The mix that `{"ids": […], "weights": […], "merge_strategy": "linear"}` asks for.

    Args:
        body: what the request's field `merged_adapters` holds. The strategy is linear by default, as in LoRAX, and
            each weight 1.

    Raises:
        MixNameError: it has another shape, or a strategy that there is none of for IA³ here.
    """
    if not isinstance(body, Mapping):
        raise MixNameError(f"{FIELD} must be an object with ids, weights and merge_strategy, not {short(body)}")
    unknown = sorted(map(str, set(body) - _KEYS))
    if unknown:
        raise MixNameError(f"{FIELD} has no field {short(unknown[0])!r}: it takes ids, weights and merge_strategy")
    ids, weights = body.get("ids"), body.get("weights")
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) and name for name in ids):
        raise MixNameError(f"{FIELD}.ids must be a list of adapters' names, not {short(ids)}")
    check_size(", ".join(ids), len(ids))
    for name in ids:
        check_name(name)  # names, and no grammar: "a*b" is not two of them
    strategy = body.get("merge_strategy", "linear")
    if not isinstance(strategy, str) or strategy not in _STRATEGIES:
        raise MixNameError(f"{FIELD}.merge_strategy {short(repr(strategy))} is not known: use {', '.join(_STRATEGIES)}")
    if weights is None and strategy != "product":
        weights = [1.0] * len(ids)
    numbers = weights is None or (
        isinstance(weights, list) and all(isinstance(w, int | float) and not isinstance(w, bool) for w in weights)
    )
    if not numbers:
        raise MixNameError(f"{FIELD}.weights must be a list of numbers, one for each of ids, not {short(weights)}")
    if weights is not None and len(weights) != len(ids):
        raise MixNameError(f"{FIELD} has {len(weights)} weights for {len(ids)} ids: give each one")
    try:
        return Mix(tuple(ids), None if weights is None else tuple(weights), _STRATEGIES[strategy])
    except (ValueError, OverflowError) as error:
        raise MixNameError(f"{FIELD}: {short(str(error))}") from error
