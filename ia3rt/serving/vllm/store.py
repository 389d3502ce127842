"""The store: a folder of IA³ checkpoints, each named by its content.

vLLM knows an adapter's keys and values in its prefix cache by the adapter's name and path, and reads an adapter again
whenever it was evicted. So what a path holds must never change: an adapter's vectors are written here when it is loaded
(a few hundred kilobytes), and here the same name always means the same numbers. That is state, and disks, people and
kills get at it: whoever reads a copy compares it with its name, and a bad one is written anew from the original.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ia3rt.adapters.checkpoint import MOST_CONFIG, Checkpoint
from ia3rt.adapters.folder import CONFIG_NAME, SAFETENSORS_NAME, local_folder
from ia3rt.adapters.keys import PREFIX, SUFFIX, sort_keys
from ia3rt.adapters.plain_file import read_plain
from ia3rt.adapters.site import SiteKey
from ia3rt.adapters.tensor_file import MOST_HEADER
from ia3rt.serving.limits import MOST_BYTES, read_served

DIGEST_LENGTH = 32
_STORED = re.compile(f"sha256-[0-9a-f]{{{DIGEST_LENGTH}}}")
_ONCE_STORED = re.compile(f"(sha256-)?[0-9a-f]{{{DIGEST_LENGTH}}}")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoreError(OSError):
    """The store cannot be written."""


class DamagedCopyError(ValueError):
    """A stored copy is gone, or is not what was stored."""


def store(adapter: str | Path, root: Path, name: str | None = None) -> Path:
    """Writes an adapter's vectors to their folder under `root`, where they are not there as they should be.

    Args:
        adapter: a folder, or the id of a repository on the Hugging Face Hub.
        root: the store's folder; made where it is missing.
        name: the adapter's, for errors; by default what `adapter` says.

    Returns:
        The folder, whose name is the SHA-256 of its files, shortened. It is the most recently used now.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: it is no IA³ adapter, a damaged one, or has more than vectors; nothing is stored then.
        StoreError: the disk is full, say; nothing is stored then.
    """
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
    source = local_folder(adapter)
    if source.parent == root and is_stored_name(source.name):
        read_stored(source)
        return source
    files = _files_of(read_served(source, name or str(adapter)))
    target = root / _name_of(files)
    with _writing(root):
        if not _is_good(target):
            _write(files, target, root)
        os.utime(target)
    return target


def check_writable(root: Path) -> None:
    """Makes the store's folder where it is missing, and sees that a copy could be written there.

    Raises:
        StoreError: none could.
    """
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=root))


def is_stored_name(name: str) -> bool:
    """Whether a folder's name is that of a stored copy."""
    return _STORED.fullmatch(name) is not None


def is_once_stored_name(name: str) -> bool:
    """Whether a folder's name is that of a stored copy, of this version or of one before."""
    return _ONCE_STORED.fullmatch(name) is not None


def read_stored(folder: Path) -> dict[SiteKey, Tensor]:
    """The vectors of a stored copy, as in `Checkpoint`.

    Raises:
        DamagedCopyError: it is gone, or is not what was stored.
    """
    try:
        files = {
            CONFIG_NAME: read_plain(folder / CONFIG_NAME, MOST_CONFIG),
            SAFETENSORS_NAME: read_plain(folder / SAFETENSORS_NAME, MOST_BYTES + MOST_HEADER),
        }
        if _name_of(files) != folder.name:
            raise ValueError("its files have changed since")
        config = json.loads(files[CONFIG_NAME])
        return sort_keys(load(files[SAFETENSORS_NAME]), config, str(folder)).vectors
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedCopyError(
            f"the stored copy {folder.name} is damaged or gone ({error}): load the adapter again, which writes it anew"
        ) from error


def signature(
    folder: Path, names: Iterable[str] = (CONFIG_NAME, SAFETENSORS_NAME)
) -> tuple[tuple[int, ...], ...] | None:
    """What changes when anybody touches a folder's files, a stored copy's; None where one is not there."""
    try:
        found = [os.stat(folder / name) for name in names]
    except OSError:
        return None
    return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)


def discard(folder: Path) -> bool:
    """Removes a stored copy that no server has loaded, or what is left of one. Returns whether it did."""
    with suppress(OSError), _locked(folder, fcntl.LOCK_EX):
        shutil.rmtree(folder)
        return True
    return False


class Held:
    """Copies that are locked, so that nobody's cleaning takes them. A kill lets go of them."""

    def __init__(self) -> None:
        self._locks: dict[Path, int] = {}

    @property
    def folders(self) -> set[Path]:
        """Those that are held."""
        return set(self._locks)

    def hold(self, folder: Path) -> None:
        """Holds one more, or one anew that was removed and stored again: what was locked then is no more."""
        with suppress(OSError):  # it is gone, and has to be stored again anyway
            held = self._locks.get(folder)
            if held is not None and os.path.samestat(os.fstat(held), os.stat(folder)):
                return
            lock = _lock(folder, fcntl.LOCK_SH)
            if held is not None:
                os.close(held)
            self._locks[folder] = lock

    def let_go(self, but: set[Path]) -> None:
        """Lets go of all but these."""
        for folder in self.folders - but:
            os.close(self._locks.pop(folder))


def _files_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What is stored of an adapter: its vectors in a .safetensors, whatever the original is, and what they were for."""
    config = {
        "peft_type": "IA3",
        "base_model_name_or_path": checkpoint.config.get("base_model_name_or_path"),
        "target_modules": sorted(path for path, _ in checkpoint.vectors),
        "feedforward_modules": sorted(path for path, side in checkpoint.vectors if side == "in"),
    }
    tensors = {f"{PREFIX}{path}{SUFFIX}": vector.contiguous() for (path, _), vector in checkpoint.vectors.items()}
    return {
        CONFIG_NAME: json.dumps(config, sort_keys=True).encode(),
        SAFETENSORS_NAME: save(tensors, metadata={"format": "pt"}),
    }


def _name_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return f"sha256-{digest.hexdigest()[:DIGEST_LENGTH]}"


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in _FULL else str(error)
        raise StoreError(
            f"the store of adapters, {root}, cannot be written: {what}; VLLM_CACHE_ROOT moves it"
        ) from error


def _is_good(folder: Path) -> bool:
    try:
        read_stored(folder)
    except DamagedCopyError:
        return False
    return True


def _write(files: Mapping[str, bytes], target: Path, root: Path) -> None:
    """Makes a copy; a bad one that is there becomes a good one, file by file, under who reads it."""
    made = Path(tempfile.mkdtemp(prefix=".", dir=root))
    try:
        with _locked(made, fcntl.LOCK_SH):  # so that it is no kill's remainder
            for name, content in files.items():
                _write_through(made / name, content)
            _sync_folder(made)
            try:
                os.rename(made, target)  # whole or not at all, whoever else stores it now
            except OSError:
                if not os.path.lexists(target):
                    raise
                _mend(made, target, files)
        _sync_folder(root)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _mend(made: Path, target: Path, files: Mapping[str, bytes]) -> None:
    if target.is_symlink() or not target.is_dir():
        target.unlink()
        os.rename(made, target)
        return
    for name in files:
        if (target / name).is_dir() and not (target / name).is_symlink():
            shutil.rmtree(target / name)
        os.replace(made / name, target / name)
    _sync_folder(target)


def _write_through(file: Path, content: bytes) -> None:
    """Writes a file down to the disk: a name must not outlive the numbers that it stands for."""
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _lock(folder: Path, kind: int) -> int:
    """Locks a folder, or raises BlockingIOError at once. Closing what is returned lets go of it."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        raise
    return opened


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    opened = _lock(folder, kind)
    try:
        yield
    finally:
        os.close(opened)
