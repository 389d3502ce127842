"""A folder that is there whole, or not at all; files that take others' place all together, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        except (SafetensorError, OSError) as error:
            # What `replacing` says of the folder here inside is said of the one that was asked for.
            why = next((each for each in (error, error.__cause__) if _names_no_file(each)), None)
            if why is None:
                raise
            raise OSError(f"cannot write {folder}: {why}") from error
        if is_there:
            _move_into(written, folder)
        else:
            os.replace(written, folder)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A context with an empty folder to write files into. They are in the folder at `path` at the end, in the place of
    files of their names; where that is an exception, everything there is as it was.

    Raises:
        OSError: they cannot be written, or the folder not made.
    """
    folder = Path(path)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ia3rt.", dir=folder) as around:
            written, old = Path(around) / "new", Path(around) / "old"
            written.mkdir()
            old.mkdir()
            yield written
            _replace(written, folder, old)
    except BaseException as error:
        for each in made:
            with suppress(OSError):  # nothing was made, or something else is in it by now
                each.rmdir()
        if _names_no_file(error):
            raise OSError(f"cannot write {folder}, where nothing has changed: {error}") from error
        raise


def _names_no_file(error: BaseException | None) -> bool:
    """Whether an error is one as of a full disk: the system's, without a file's name, or safetensors', no OSError."""
    if isinstance(error, OSError):
        return error.errno is not None and error.filename is None
    return isinstance(error, SafetensorError)


def _replace(written: Path, folder: Path, old: Path) -> None:
    """Moves files into a folder, where those of their names are kept in `old` meanwhile; all, or none.

    Each takes the other's place at once, so that who reads finds one of them.
    """
    moved: list[str] = []
    try:
        for name in sorted((file.name for file in written.iterdir()), key=lambda name: (name in _LAST, name)):
            if (folder / name).is_dir():
                raise IsADirectoryError(f"{folder / name} is a folder, and not a file to replace")
            moved.append(name)
            if os.path.lexists(folder / name):
                _keep(folder / name, old / name)
            os.rename(written / name, folder / name)
    except BaseException:
        for name in moved:
            if os.path.lexists(old / name):
                os.replace(old / name, folder / name)
            elif not os.path.lexists(written / name):
                (folder / name).unlink(missing_ok=True)
        raise


def _keep(file: Path, kept: Path) -> None:
    try:
        os.link(file, kept, follow_symlinks=False)
    except OSError:  # a file system without such links
        shutil.copy2(file, kept, follow_symlinks=False)


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
