"""Reads a file of named tensors, a .safetensors or a pickle, and says what is wrong with one that cannot be read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, in an order that does not change from one load to the next.

    A pickle that would run code is refused, never run.

    Raises:
        ValueError: the file is damaged, or something else than its name says.
    """
    with file.open("rb") as opened:
        begin = opened.read(32)
    if not begin:
        raise ValueError(f"{file} is damaged: it is empty, 0 bytes")
    if begin.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is damaged: it is a pointer of Git LFS and not the file itself; run `git lfs pull`")
    if file.suffix == ".safetensors":
        return _safetensors(file, file.read_bytes())
    return _pickle(file)


def _safetensors(file: Path, content: bytes) -> dict[str, Tensor]:
    try:
        # Four times as fast as mapping so small a file.
        return dict(sorted(load(content).items()))
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {_damage(content) or error}") from error


def _damage(content: bytes) -> str | None:
    """What is wrong with a .safetensors file: a header's length in 8 bytes, the header in JSON, the numbers."""
    if content.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "it is a pickle of torch.save and no .safetensors file; name it as one, with the ending .bin"
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > 100_000_000:  # the format's own limit
        return "it does not begin with the length of a header, so it is no .safetensors file"
    if len(content) < 8 + length:
        return f"it ends within its header: {len(content):,} of at least {8 + length:,} bytes are there"
    try:
        header = json.loads(content[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
        return f"its header is broken: {error}"
    expected = 8 + length + max(ends, default=0)
    if len(content) < expected:
        return f"its end is missing: {len(content):,} of {expected:,} bytes are there"
    return None


def _pickle(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{file} is damaged or is no {file.suffix} file of tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{file} holds no mapping of names to tensors, but a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{file} holds no mapping of names to tensors: {name!r} is a {type(tensor).__name__}")
    return {name: tensor.detach() for name, tensor in tensors.items()}
