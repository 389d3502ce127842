"""The vectors of stored copies that an API server has read, so that a mix of many adapters is composed in no time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from torch import Tensor

from ia3rt.adapters.site import SiteKey
from ia3rt.serving.vllm.source import read_folder
from ia3rt.serving.vllm.store import is_stored_name


class Read:
    """Reads folders, and keeps those whose name says what is in them; used by several threads.

    Args:
        most: bytes that the kept vectors may have together; those used least recently go first.
    """

    def __init__(self, most: int) -> None:
        self._most, self._total = most, 0
        self._kept: OrderedDict[Path, dict[SiteKey, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, folder: Path, name: str) -> dict[SiteKey, Tensor]:
        """The vectors in a folder, which nobody may change. Raises what `read_folder` does."""
        with self._lock:
            if folder in self._kept:
                self._kept.move_to_end(folder)
                return self._kept[folder]
        vectors = read_folder(folder, name)
        if is_stored_name(folder.name):
            with self._lock:
                self._keep(folder, vectors)
        return vectors

    def _keep(self, folder: Path, vectors: dict[SiteKey, Tensor]) -> None:
        if folder not in self._kept:  # another thread may have read it meanwhile
            self._kept[folder] = vectors
            self._total += _size(vectors)
        while self._total > self._most:
            _, gone = self._kept.popitem(last=False)
            self._total -= _size(gone)


def _size(vectors: dict[SiteKey, Tensor]) -> int:
    return sum(vector.nbytes for vector in vectors.values())
