"""What goes from the store: what a kill left half written, and, past its limit, what was used least recently."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ia3rt.serving.vllm.store import discard, is_once_stored_name

_SECONDS = 60.0
"""Who writes a copy locks it a moment after having made its folder."""


@dataclass(frozen=True)
class Copy:
    """A stored copy.

    Attributes:
        folder: where it is.
        size: in bytes.
        used: when it was stored or found again, in seconds since 1970.
    """

    folder: Path
    size: int
    used: float


def copies(root: Path) -> list[Copy]:
    """The store's copies, the least recently used first; none where there is no store."""
    found = []
    for folder in _folders(root):
        if is_once_stored_name(folder.name):
            try:
                size = sum(file.stat().st_size for file in folder.iterdir())
                found.append(Copy(folder, size, folder.stat().st_mtime))
            except OSError:  # another server has removed it meanwhile
                continue
    return sorted(found, key=lambda copy: copy.used)


def sweep(root: Path, most: float) -> list[Path]:
    """Removes what was left half written, and copies past the limit that no server has loaded.

    Args:
        root: the store's folder.
        most: bytes that its copies may have together.

    Returns:
        What was removed.
    """
    begun = time.time() - _SECONDS
    removed = [folder for folder in _folders(root) if _is_remainder(folder, begun) and discard(folder)]
    found = copies(root)
    size = sum(copy.size for copy in found)
    for copy in found:
        if size <= most:
            break
        if discard(copy.folder):
            removed.append(copy.folder)
            size -= copy.size
    return removed


def _is_remainder(folder: Path, begun: float) -> bool:
    try:
        return folder.name.startswith(".") and folder.stat().st_mtime < begun
    except OSError:
        return False


def _folders(root: Path) -> list[Path]:
    return [child for child in root.iterdir() if child.is_dir()] if root.is_dir() else []
