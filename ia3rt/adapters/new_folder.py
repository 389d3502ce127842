"""A folder that is there whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ia3rt.adapters.folder import CONFIG_NAME

_LAST = (CONFIG_NAME, "config.json")
"""What makes a folder an adapter's or a model's: it comes last where files come one after another."""


def check_new(path: str | Path) -> Path:
    """The path, where nothing is or an empty folder.

    Raises:
        FileExistsError: something is there.
        NotADirectoryError: it would be inside of a file.
        OSError: it cannot be: its name is too long, or who asks may not look there.
    """
    folder = Path(path)
    try:
        os.lstat(folder)
    except FileNotFoundError:
        return folder
    except NotADirectoryError as error:
        file = next(parent for parent in folder.parents if parent.exists())
        raise NotADirectoryError(f"{folder} cannot be made, as {file} is a file: name another folder") from error
    if not folder.is_dir() or any(folder.iterdir()):
        raise FileExistsError(f"{folder} is there already, and is not overwritten: name a new folder, or remove it")
    return folder


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A context with an empty folder to write into. It is at `path` at the end, or gone where that is an exception.

    An empty folder at `path` stays the folder that it is, with its mode, as it may be a mount point, a link, or where a
    shell stands; it is empty again after an exception.

    Raises:
        FileExistsError, NotADirectoryError: as `check_new`.
        OSError: it cannot be written.
    """
    folder = check_new(path).absolute()
    is_there = folder.is_dir()
    if not is_there:
        folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside what it becomes, or inside of it: nothing can be renamed from one file system to another.
    with tempfile.TemporaryDirectory(prefix=".ia3rt.", dir=folder if is_there else folder.parent) as around:
        written = Path(around) / "new"  # which anyone may read that may read others; what is around it is private
        written.mkdir()
        try:
            yield written
        except SafetensorError as error:  # what safetensors raises on a full disk
            raise OSError(f"cannot write {folder}: {error}") from error
        if is_there:
            _move_into(written, folder)
        else:
            os.replace(written, folder)


def _move_into(written: Path, folder: Path) -> None:
    """Moves the contents into an otherwise empty folder, all or none."""
    if any(entry != written.parent for entry in folder.iterdir()):
        raise FileExistsError(f"{folder} is no longer empty: something else was written into it")
    moved = []
    try:
        for entry in sorted(written.iterdir(), key=lambda entry: (entry.name in _LAST, entry.name)):
            moved.append(folder / entry.name)
            os.rename(entry, moved[-1])
    except BaseException:
        for entry in moved:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        raise
