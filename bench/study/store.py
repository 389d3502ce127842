"""What a run has worked out so far, on disk, by what it was worked out from: a run that is killed goes on."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

Tensors = Mapping[str, Tensor]


class Store:
    """Tensors by key, each written at once or not at all.

    Args:
        file: a SQLite database, made where it is missing.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(file, isolation_level=None)
        for setting in ("journal_mode = WAL", "synchronous = NORMAL"):  # a killed process loses nothing by it
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE IF NOT EXISTS seconds (part TEXT PRIMARY KEY, taken REAL NOT NULL)")
        self._database.execute("CREATE TABLE IF NOT EXISTS pieces (begun TEXT PRIMARY KEY)")
        self._database.execute("CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, tensors BLOB NOT NULL)")

    def get(self, key: str) -> Tensors | None:
        """What is known by this key; None where nothing is."""
        row = self._database.execute("SELECT tensors FROM results WHERE key = ?", (key,)).fetchone()
        return None if row is None else load(row[0])

    def once(self, key: str, compute: Callable[[], Tensors]) -> Tensors:
        """What is known by this key, or else what `compute` gives, which is known from then on."""
        known = self.get(key)
        if known is None:
            known = compute()
            written = save({name: x.contiguous() for name, x in known.items()})
            self._database.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, written))
        return known

    def once_data(self, key: str, compute: Callable[[], Any]) -> Any:
        """As `once`, of what JSON can say."""

        def compute_text() -> Tensors:
            return {"json": torch.tensor(list(json.dumps(compute()).encode()), dtype=torch.uint8)}

        return json.loads(bytes(self.once(key, compute_text)["json"].tolist()))

    def begins(self, now: str) -> list[str]:
        """Says that a run begins, or goes on; returns when each of them did, by this one's way to say it."""
        self._database.execute("INSERT OR IGNORE INTO pieces VALUES (?)", (now,))
        return [begun for (begun,) in self._database.execute("SELECT begun FROM pieces ORDER BY begun")]

    def took(self, part: str, seconds: float) -> None:
        """Adds up how long a part took, over all runs that worked at it."""
        added = "INSERT INTO seconds VALUES (?, ?) ON CONFLICT (part) DO UPDATE SET taken = taken + excluded.taken"
        self._database.execute(added, (part, seconds))

    @property
    def seconds(self) -> dict[str, float]:
        """How long each part took so far."""
        return dict(self._database.execute("SELECT part, taken FROM seconds").fetchall())

    def close(self) -> None:
        """Closes the file."""
        self._database.close()


def key_of(*parts: object) -> str:
    """SHA-256 of what a result depends on: tensors by their numbers and shapes, mappings in order, all else by repr."""
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, part: object) -> None:
    if isinstance(part, Tensor):
        digest.update(repr((part.dtype, tuple(part.shape))).encode())
        digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(part, Mapping):
        for name, each in part.items():
            digest.update(repr(name).encode())
            _feed(digest, each)
    else:
        digest.update(f"{part!r};".encode())
