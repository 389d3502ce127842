"""Models whose adapters are registered, six of them and few rows of the bank, and how they are compared with PEFT's."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import logits, tiny_model, token_ids

import ia3rt

NAMES = "abcdef"
IDS = token_ids(rows=4)
WIDTH = 2 * (32 + 32 + 96)
ROW = 4 * WIDTH
"""Bytes of an adapter's row."""


def patched(folder: Path, rows: int = 2, **settings: object) -> ia3rt.Runtime:
    runtime = ia3rt.patch(tiny_model(), capacity=rows, grow=False, **settings)
    assert runtime.register(folder) == list(NAMES)
    return runtime


def check(runtime: ia3rt.Runtime, truth: dict[str | None, torch.Tensor], rows: list[str | None]) -> None:
    """Compares each row of a batch with PEFT's."""
    with runtime.route(rows):
        given = logits(runtime.model, IDS)
    for row, name in enumerate(rows):
        assert torch.equal(given[row], truth[name][row]), (row, name)


def replace(folder: Path, scale: float) -> None:
    """Writes an adapter whose vectors are another's by a factor, as an atomic save does."""
    file = folder / "adapter_model.safetensors"
    tensors = {key: vector * scale for key, vector in load_file(file).items()}
    save_file(tensors, folder / "new", metadata={"format": "pt"})
    (folder / "new").replace(file)


def held(runtime: ia3rt.Runtime) -> int:
    """The bytes of all rows of the host's memory, counted by their storages."""
    rows = runtime._tiers._reader.kept._rows.values()
    return sum(row.row.untyped_storage().nbytes() for row in rows)
