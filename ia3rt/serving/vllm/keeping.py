"""The stored copies of what an API server has loaded: held, looked after, and written anew where something happened."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from pathlib import Path

from ia3rt.serving.settings import store_bytes, store_folder
from ia3rt.serving.vllm.cleaning import sweep
from ia3rt.serving.vllm.store import DamagedCopyError, Held, is_stored_name, read_stored, signature, store

MOST = 10_000
"""Copies whose originals are remembered."""


class Keeping:
    """What this process has stored.

    Args:
        root: the store's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._originals: OrderedDict[Path, str] = OrderedDict()
        self._seen: dict[Path, object] = {}
        self._held = Held()
        self._lock = threading.Lock()

    def store(self, original: str, name: str) -> Path:
        """Stores an adapter and removes what is past the store's limit; see store.store."""
        folder = store(original, self._root, name)
        with self._lock:
            self._held.hold(folder)
            self._remember(folder, original)
            sweep(self._root, store_bytes())
        return folder

    def hold_only(self, folders: set[Path]) -> None:
        """Holds the copies of what is loaded now, and no others: cleaning may take those."""
        with self._lock:
            self._held.let_go(folders)
            for folder in folders:
                self._held.hold(folder)

    def is_as_it_was(self, folder: Path) -> bool:
        """Whether nobody has touched a copy since it was last read and found good."""
        now = signature(folder)  # None where it is gone, maybe in the very moment after it was stored
        return now is not None and self._seen.get(folder) == now

    def mend(self, folder: Path, name: str) -> None:
        """Reads a copy that somebody touched, and writes it anew from its original where it is damaged or gone.

        Raises:
            DamagedCopyError: it is, and the original is gone or damaged too, or holds other numbers now.
            StoreError: the store cannot be written.
        """
        original = self._originals.get(folder, "")
        try:
            read_stored(folder)
        except DamagedCopyError as damage:
            try:
                made = store(original, self._root, name) if original else None
            except (FileNotFoundError, ValueError) as error:
                raise _lost(name, damage, f"its original cannot be read: {error}") from error
            if made != folder:
                raise _lost(name, damage, "its original holds other numbers now") from damage
        with self._lock:
            self._held.hold(folder)
            self._remember(folder, original)

    def _remember(self, folder: Path, original: str) -> None:
        self._seen[folder] = signature(folder)
        self._originals[folder] = original
        self._originals.move_to_end(folder)
        if len(self._originals) > MOST:
            gone, _ = self._originals.popitem(last=False)
            self._seen.pop(gone, None)


@functools.cache
def keeping() -> Keeping:
    """This process's."""
    return Keeping(store_folder())


def is_stored_path(path: str) -> bool:
    """Whether a LoRARequest's path is that of a stored copy."""
    return is_stored_name(Path(path).name) and Path(path).parent == store_folder()


def _lost(name: str, damage: DamagedCopyError, why: str) -> DamagedCopyError:
    return DamagedCopyError(f"adapter {name!r} cannot be read any more: {damage}; {why}")
