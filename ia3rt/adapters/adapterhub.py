"""AdapterHub's IA³ adapters (the package adapters 1.3.0), read as what PEFT would have saved.

AdapterHub knows IA³ as a LoRA of rank 1 that scales: a module's output, with its bias, is multiplied by alpha ∘ lora_B.
All its vectors are at outputs, those of MLPs too. Only its merge_adapter() leaves the bias unscaled: what that
makes is another model than the one that was trained, and ia3rt computes the trained one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ia3rt.adapters.folder import ADAPTERHUB_HEAD_NAMES, ADAPTERHUB_NAMES, find_file
from ia3rt.adapters.given import check_floating
from ia3rt.adapters.site import SiteKey
from ia3rt.adapters.tensor_file import read_tensors

_VECTOR = re.compile(r"(?P<path>.+)\.loras\.(?P<adapter>[^.]+)\.lora_B")
_FUSED = ("c_attn", "in_proj")
"""Projections of queries, keys and values in one; a vector there has numbers for those of attn_matrices only."""
_ATTENTION = ("q", "k", "v")


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is AdapterHub's: it keeps the method's settings under `config`."""
    return "peft_type" not in config and "config" in config


def is_ia3(config: Mapping[str, Any]) -> bool:
    """Whether an AdapterHub config says IA³."""
    return _settings(config).get("composition_mode") == "scale"


def read(
    folder: Path,
    config: Mapping[str, Any],
    accept: Callable[[dict[SiteKey, Tensor], dict[str, dict[str, Tensor]]], object],
) -> tuple[dict[SiteKey, Tensor], dict[str, dict[str, Tensor]]]:
    """The vectors of an AdapterHub adapter, and the modules of the head that was saved beside it.

    Args:
        folder: the adapter's.
        config: its adapter_config.json.
        accept: is given the vectors, and then the modules, before a number of theirs is read, of device meta. What it
            raises is raised.

    Returns:
        As in `Checkpoint`: [out_features, 1] by site, and the head's tensors by module path and name.

    Raises:
        FileNotFoundError: there are no weights beside the config.
        ValueError: the adapter is not IA³, or its files are damaged or hold something else.
    """
    settings = _settings(config)
    if not is_ia3(config):
        kind = settings.get("architecture", config["config"])
        raise ValueError(
            f"{folder} is an AdapterHub adapter of kind {kind!r} (composition_mode "
            f"{settings.get('composition_mode')!r}): ia3rt runs IA³ adapters, whose composition_mode is 'scale'"
        )
    if settings.get("use_gating"):
        raise ValueError(
            f"{folder} is an AdapterHub adapter with use_gating: its scale depends on the input, IA³'s does not"
        )
    file = find_file(folder, ADAPTERHUB_NAMES)

    def sort(tensors: Mapping[str, Tensor]) -> dict[SiteKey, Tensor]:
        return _vectors(file, tensors, settings)

    vectors = sort(read_tensors(file, lambda tensors: accept(sort(tensors), {})))
    return vectors, _head(folder, lambda modules: accept({}, modules))


def as_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT's adapter_config.json would say of it besides the sites and the head."""
    return {"peft_type": "IA3", "task_type": None, "base_model_name_or_path": config.get("model_name") or None}


def _vectors(file: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[SiteKey, Tensor]:
    vectors: dict[SiteKey, Tensor] = {}
    for key, tensor in tensors.items():
        match = _VECTOR.fullmatch(key)
        if match is None:
            raise ValueError(f"{file} holds {key!r}, which is no IA³ vector of AdapterHub (….loras.NAME.lora_B)")
        site: SiteKey = match["path"], "out"
        if site in vectors:
            raise ValueError(f"{file} holds two vectors for {match['path']!r}: one of them is {key!r}")
        vectors[site] = _vector(match["path"], tensor, settings)
    if not vectors:
        raise ValueError(f"{file} holds no vectors")
    return vectors


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = config["config"]
    if settings == "ia3":  # by name, where all is as it is by default
        return {"composition_mode": "scale"}
    return settings if isinstance(settings, Mapping) else {}


def _vector(path: str, tensor: Tensor, settings: Mapping[str, Any]) -> Tensor:
    check_floating(tensor, f"the vector at {path!r}")
    if tensor.dim() != 2 or tensor.shape[1] != 1:
        raise ValueError(f"the vector at {path!r} has shape {tuple(tensor.shape)}: AdapterHub's have [out_features, 1]")
    matrices, scaled_by = settings.get("attn_matrices", ("k", "v")), settings.get("alpha", 1)
    if not isinstance(matrices, list | tuple | str) or not isinstance(scaled_by, int | float):
        raise ValueError(
            f"attn_matrices is {matrices!r} and alpha {scaled_by!r}: AdapterHub's are names, such as ['k', 'v'], and a "
            "number"
        )
    scaled = [name in matrices for name in _ATTENTION]
    if path.rpartition(".")[2] in _FUSED and any(scaled):
        parts = iter(tensor.chunk(sum(scaled)))
        ones = torch.ones(len(tensor) // sum(scaled), 1, dtype=tensor.dtype, device=tensor.device)
        tensor = torch.cat([next(parts) if each else ones for each in scaled])
    return tensor * scaled_by


def _head(folder: Path, accept: Callable[[dict[str, dict[str, Tensor]]], object]) -> dict[str, dict[str, Tensor]]:
    """The head's tensors by module path and name; none where no head was saved."""
    try:
        file = find_file(folder, ADAPTERHUB_HEAD_NAMES)
    except FileNotFoundError:
        return {}

    def sort(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return _modules(file, tensors)

    return sort(read_tensors(file, lambda tensors: accept(sort(tensors))))


def _modules(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.partition(".")
        if path == "heads":
            raise ValueError(
                f"{file} holds {key!r}, a head of one of AdapterHub's own model classes, which no model of "
                f"transformers has: take the file away to load the vectors alone"
            )
        modules.setdefault(path, {})[name] = tensor
    return modules
