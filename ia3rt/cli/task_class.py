"""Which class a model is loaded as, where an adapter brings a head that the class of the model's config lacks."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ia3rt.adapters.checkpoint import Checkpoint

_MAPPINGS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}
"""By PEFT's task_type: where transformers has the classes for it, by config."""
_TRIED = (5, 7)
"""Numbers of labels; no head has the one in one model and the other in the next for another reason."""


def class_for_task(cls: Any, config: Any, adapters: Collection[Checkpoint]) -> Any | None:
    """The class for the adapters' task, as PEFT's users load it; None where `cls` has their modules, or none is there.

    The config is given the adapter's number of labels then.

    Args:
        cls: the model's class, as its config says.
        config: the model's.
        adapters: whose own modules there are to be.
    """
    with_head = [adapter for adapter in adapters if adapter.modules and adapter.config.get("task_type") in _MAPPINGS]
    tasks = {adapter.config["task_type"] for adapter in with_head}
    if len(tasks) != 1:
        return None
    with torch.device("meta"):
        there = {name for name, _ in cls(config).named_modules()}
    lacking = {path: adapter.modules[path] for adapter in with_head for path in adapter.modules if path not in there}
    if not lacking:
        return None
    transformers: Any = importlib.import_module("transformers")  # Any: it is not typed
    found = getattr(transformers, _MAPPINGS[tasks.pop()]).get(type(config), None)
    if found is not None:
        config.num_labels = _labels(found, config, lacking) or config.num_labels
    return found


def _labels(cls: Any, config: Any, heads: Mapping[str, Mapping[str, Tensor]]) -> int | None:
    """How many labels an adapter's heads are for: the size that changes where the class is made for others.

    None where no size does, as of a class that has two always.
    """
    few, more = (_shapes(cls, config, labels) for labels in _TRIED)
    for path, head in heads.items():
        for name, tensor in head.items():
            key = f"{path}.{name}"
            for place, sizes in enumerate(zip(few.get(key, ()), more.get(key, ()), strict=True)):
                if sizes == _TRIED and place < tensor.dim():
                    return tensor.shape[place]
    return None


def _shapes(cls: Any, config: Any, labels: int) -> dict[str, torch.Size]:
    tried = copy.deepcopy(config)
    tried.num_labels = labels
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in cls(tried).state_dict().items()}
    except (ValueError, AssertionError):  # DistilBERT's class for questions takes two and no others
        return {}
