"""A folder of IA³ checkpoints, each named by its content.

vLLM knows an adapter's keys and values in its prefix cache by the adapter's name and path, and reads an adapter again
whenever it was evicted. So what a path holds must never change: an adapter is copied here when it is loaded (a few
hundred kilobytes), and here the same name always means the same numbers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from ia3rt.adapters.checkpoint import read_checkpoint
from ia3rt.adapters.folder import FILE_NAMES, local_folder

DIGEST_LENGTH = 32


def store(adapter: str | Path, root: Path) -> Path:
    """Copies a checkpoint to its folder under `root`, where it is not there yet.

    Args:
        adapter: a folder, or the id of a repository on the Hugging Face Hub.
        root: the store's folder; made where it is missing.

    Returns:
        The folder, whose name is the SHA-256 of the files, shortened.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: it is no IA³ adapter, a damaged one, or has more than vectors; nothing is stored then.
    """
    source = local_folder(adapter)
    if source.parent == root and source.is_dir():
        return source
    files = {name: (source / name).read_bytes() for name in FILE_NAMES if (source / name).is_file()}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    target = root / digest.hexdigest()[:DIGEST_LENGTH]
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".", dir=root))
    try:
        for name, content in files.items():
            (made / name).write_bytes(content)
        read_checkpoint(made).vectors_alone(str(adapter))
        os.replace(made, target)  # whole or not at all, whoever else stores it now
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target
