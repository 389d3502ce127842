"""Adapters of a few numbers, written to a folder by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write(folder: Path, value: float = 2.0, width: int = 4, keys: tuple[str, ...] = ("base_model.model.fc",), **config):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{key}.ia3_l": torch.full((1, width), value) for key in keys}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", **config}))
    return folder
