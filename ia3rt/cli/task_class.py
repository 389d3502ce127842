"""Which class a model is loaded as, where an adapter brings a head that the class of the model's config lacks."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

import torch

from ia3rt.adapters.checkpoint import Checkpoint

_MAPPINGS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}
"""By PEFT's task_type: where transformers has the classes for it, by config."""


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
    lacking = [adapter.modules[path] for adapter in with_head for path in adapter.modules if path not in there]
    if not lacking:
        return None
    transformers: Any = importlib.import_module("transformers")  # Any: it is not typed
    found = getattr(transformers, _MAPPINGS[tasks.pop()]).get(type(config), None)
    for head in lacking:
        last = head.get("weight", head.get("out_proj.weight"))  # a linear layer, or RoBERTa's and its kin's
        if found is not None and last is not None and last.dim() == 2:
            config.num_labels = len(last)
    return found
