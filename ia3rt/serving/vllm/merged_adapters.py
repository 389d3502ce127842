"""Mixes as a request's body gives them, in the shape of LoRAX's `merged_adapters`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ia3rt.adapters.mix import Mix
from ia3rt.adapters.mix_text import MixNameError, check_name, check_size

FIELD = "merged_adapters"
_FIELDS = ("ids", "weights", "merge_strategy")


def read_merged_adapters(body: Any) -> Mix:
    """The mix that `{"ids": […], "weights": […], "merge_strategy": "linear"}` asks for.

    Args:
        body: what the request's field `merged_adapters` holds. The strategy is linear by default, as in LoRAX, and
            each weight 1.

    Raises:
        MixNameError: it has another shape, or a strategy that there is none of for IA³ here.
    """
    if isinstance(body, Mapping):
        ids, strategy = body.get("ids"), body.get("merge_strategy", "linear")
        body = {**body, "merge_strategy": strategy}
        if isinstance(ids, list):
            check_size(FIELD, len(ids))
            for name in ids:
                if isinstance(name, str):
                    check_name(name)  # names, and no grammar: "a*b" is not two of them
            if body.get("weights") is None and strategy != "product":
                body["weights"] = [1.0] * len(ids)
    try:
        return Mix.of_data(body, FIELD, _FIELDS)
    except ValueError as error:
        raise MixNameError(str(error)) from error
