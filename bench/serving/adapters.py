"""Adapters for a server's benchmark: IA³ of random vectors, and LoRAs of the same layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ia3rt.bench.adapters import AdapterSet
from ia3rt.bench.models import build_model
from ia3rt.bench.profile.memory import RANK
from ia3rt.bench.settings import Settings

DISTINCT_LORAS = 8
"""So many LoRAs are different; those beyond are these again, under names of their own."""


def ia3_folders(model: Path, folder: Path, count: int) -> list[Path]:
    """A folder with a checkpoint for each adapter; after 16 they are the same again."""
    made = AdapterSet(build_model(Settings([], [], model=str(model))), folder)
    return [made.folder(f"task{number}") for number in range(count)]


def lora_folders(model: Path, folder: Path, count: int) -> list[Path]:
    """The same for LoRAs of rank RANK for k_proj, v_proj and down_proj."""
    from torch import nn

    targets = ("k_proj", "v_proj", "down_proj")
    layers = {
        path: layer
        for path, layer in build_model(Settings([], [], model=str(model))).named_modules()
        if path.endswith(targets) and isinstance(layer, nn.Linear)
    }
    folders = []
    for number in range(min(count, DISTINCT_LORAS)):
        made = folder / f"lora{number}"
        made.mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for path, layer in layers.items():
            a = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
            tensors[f"base_model.model.{path}.lora_A.weight"] = a
            b = 0.05 * torch.randn(layer.out_features, RANK, generator=generator)
            tensors[f"base_model.model.{path}.lora_B.weight"] = b
        save_file(tensors, made / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(targets), "bias": "none"}
        (made / "adapter_config.json").write_text(json.dumps(config))
        folders.append(made)
    return [folders[number % len(folders)] for number in range(count)]
