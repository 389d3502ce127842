"""What an adapter may be for a server to read it: known before a number of it is read.

Whoever may load an adapter says where it is, so these are files that nobody has looked at.
"""

from __future__ import annotations

from pathlib import Path

from ia3rt.adapters.checkpoint import Checkpoint, read_checkpoint
from ia3rt.adapters.folder import FILE_NAMES
from ia3rt.adapters.plain_file import check_plain

MOST_BYTES = 1 << 28
"""Bytes of a file. In float32 every linear layer of a model of 405 billion weights wears a third of that."""
MOST_VECTORS = 1 << 14
"""Vectors of an adapter; the same model has 882 linear layers."""
FILES = (*FILE_NAMES, "adapter_model.pt")
"""All that is read of an adapter, IA³ or LoRA, by ia3rt or by vLLM."""


def check_files(folder: Path) -> None:
    """Looks at an adapter's files, IA³ or LoRA, without opening one.

    Raises:
        ValueError: one is a pipe, a device or the like.
    """
    for name in FILES:
        try:
            check_plain(folder / name)
        except FileNotFoundError:
            continue


def read_served(folder: Path, name: str) -> Checkpoint:
    """Reads an IA³ adapter that a server can serve.

    Args:
        folder: a folder here.
        name: the adapter's, for errors.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the adapter is of another kind, damaged, larger than a server reads, or more than vectors.
    """
    for file in FILE_NAMES:
        if (folder / file).exists() and check_plain(folder / file) > MOST_BYTES:
            raise ValueError(
                f"adapter {name!r} cannot be served: {folder / file} has {check_plain(folder / file):,} bytes, and a "
                f"server reads {MOST_BYTES:,} at most"
            )
    return read_checkpoint(folder, accept=lambda declared: _check(declared, name))


def _check(declared: Checkpoint, name: str) -> None:
    vectors = declared.vectors_alone(name)
    size = sum(vector.numel() * vector.itemsize for vector in vectors.values())
    if size > MOST_BYTES or len(vectors) > MOST_VECTORS:
        raise ValueError(
            f"adapter {name!r} cannot be served: its {len(vectors):,} vectors have {size:,} bytes, and a server reads "
            f"{MOST_VECTORS:,} vectors of {MOST_BYTES:,} bytes at most"
        )
