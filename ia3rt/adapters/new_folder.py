"""A folder that is there whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(path: str | Path) -> Path:
    """The path, where nothing is or an empty folder.

    Raises:
        FileExistsError: something is there.
    """
    folder = Path(path)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already, and is not overwritten: name a new folder, or remove it")
    return folder


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A context with an empty folder to write into. It is at `path` at the end, or gone where that is an exception.

    Raises:
        FileExistsError: as `check_new`.
    """
    folder = check_new(path).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as around:
        written = Path(around) / "new"  # which anyone may read that may read others; what is around it is private
        written.mkdir()
        yield written
        os.replace(written, folder)
