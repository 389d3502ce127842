"""Composed mixes, as files that the API server writes and the engine's workers read.

To compose a mix of 64 adapters takes a tenth of a second, most of it to read them, and vLLM reads an adapter within a
step, while everybody waits. So the API server composes, before the engine knows of the request, and the step reads one
file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections import OrderedDict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from vllm import envs

from ia3rt.adapters.site import Site

MOST_BYTES = 256 << 20
"""What the files may be together; those used least recently are removed. One that a step misses is composed there."""
MOST_FILES = 10_000
"""How many they may be: of a small model a file is small."""
_DIGEST = hashlib.sha256
_DIGEST_SIZE = 32


def mixes_root() -> Path:
    """The folder of composed mixes, which all workers have to see: VLLM_CACHE_ROOT's ia3rt/mixes."""
    return Path(envs.VLLM_CACHE_ROOT).expanduser() / "ia3rt" / "mixes"


def read_composed(path: str, root: Path) -> dict[Site, Tensor] | None:
    """The vectors of the mix whose LoRARequest has this path, float32 [width]; None where none are kept, or damaged."""
    try:
        content = (root / _name(path)).read_bytes()
        if _DIGEST(content[_DIGEST_SIZE:]).digest() != content[:_DIGEST_SIZE]:
            return None
        tensors = load(content[_DIGEST_SIZE:])
    except (OSError, SafetensorError):
        return None
    return {_site(key, vector): vector for key, vector in tensors.items()}


class ComposedMixes:
    """The folder, and which of its files this server may remove.

    Args:
        root: the folder; made where it is missing.
        most_bytes: what the files may be together.
    """

    def __init__(self, root: Path, most_bytes: int = MOST_BYTES) -> None:
        self._root = root
        self._most = most_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._total = 0
        for _, name, size in sorted(_files(root)):
            self._add(name, size)

    def holds(self, path: str) -> bool:
        """Whether the mix with this path is there, which is then used last."""
        name = _name(path)
        if name not in self._sizes or not (self._root / name).is_file():
            return False
        self._sizes.move_to_end(name)
        return True

    def write(self, path: str, vectors: dict[Site, Tensor]) -> None:
        """Keeps a mix.

        Args:
            path: its LoRARequest's.
            vectors: float32 [width] by site.

        Raises:
            OSError: the file cannot be written; there is none then.
        """
        content = save({f"{site.side}:{site.path}": vector.contiguous() for site, vector in vectors.items()})
        self._root.mkdir(parents=True, exist_ok=True)
        name = _name(path)
        handle, made = tempfile.mkstemp(prefix=".", dir=self._root)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_DIGEST(content).digest() + content)
            os.replace(made, self._root / name)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(made)
            raise
        self._add(name, _DIGEST_SIZE + len(content))

    def _add(self, name: str, size: int) -> None:
        self._total += size - self._sizes.pop(name, 0)
        self._sizes[name] = size
        while len(self._sizes) > 1 and (self._total > self._most or len(self._sizes) > MOST_FILES):
            oldest, size = self._sizes.popitem(last=False)
            self._total -= size
            (self._root / oldest).unlink(missing_ok=True)


def _files(root: Path) -> list[tuple[float, str, int]]:
    """When each file was written, its name, and its bytes."""
    found = []
    for file in root.glob("*"):
        with contextlib.suppress(OSError):  # another server may remove it now
            told = file.stat()
            found.append((told.st_mtime, file.name, told.st_size))
    return found


def _name(path: str) -> str:
    return _DIGEST(path.encode()).hexdigest()


def _site(key: str, vector: Tensor) -> Site:
    side, _, path = key.partition(":")
    return Site(path, "in" if side == "in" else "out", vector.numel())
