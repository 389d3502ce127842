"""Where adapters are that are known by name and not loaded yet, and whether their files have changed."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from ia3rt.adapters.adapter import Stamp
from ia3rt.adapters.checkpoint import Checkpoint, read_checkpoint
from ia3rt.adapters.folder import CONFIG_NAME, FILE_NAMES, adapter_folders
from ia3rt.adapters.shortened import some

AdapterSource: TypeAlias = "str | Path | Mapping[str, str | Path] | Callable[[str], str | Path | None]"
"""A folder of adapters' folders, a mapping of names to folders, or a function of a name that gives one or None."""

_TRIES = 3
_SETTLED = 0.03
"""Seconds after which a file that changes has another time: more than the steps that file systems tell time in."""


class Registry:
    """Names, each with the folder that holds the adapter.

    Attributes:
        folders: by name.
        finders: functions that are asked for other names, in this order.
    """

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.finders: list[Callable[[str], str | Path | None]] = []

    @staticmethod
    def read(source: AdapterSource) -> dict[str, Path]:
        """The names that a source makes known, none of a function. It looks for each adapter's files.

        Raises:
            FileNotFoundError: it is no folder, or an adapter is not where it says.
            ValueError: a name is none, or the folder is an adapter's.
            TypeError: it is no source.
        """
        if isinstance(source, str | Path):
            found = _inside(Path(source).absolute())
        elif isinstance(source, Mapping):
            found = {name: _checked(name, folder) for name, folder in source.items()}
            if not found:
                raise ValueError("an empty mapping: there is no adapter to register")
        elif callable(source):
            return {}
        else:
            raise TypeError(f"{source!r} is no source of adapters: give a folder, a mapping or a function of a name")
        return found

    def check(self, found: Mapping[str, Path]) -> None:
        """Raises ValueError where a name is registered already, with another folder."""
        for name, folder in found.items():
            known = self.folders.get(name, folder)
            if known != folder:
                raise ValueError(
                    f"an adapter named {name!r} is registered already, as {known}: delete_adapter it first, or give "
                    f"{folder} another name"
                )

    def knows(self, name: str) -> bool:
        """Whether it is a name of an adapter: a function may give a folder for any text, a mix's too."""
        if name in self.folders:
            return True
        folder = self.find(name)
        return folder is not None and (folder / CONFIG_NAME).is_file()

    def find(self, name: str) -> Path | None:
        """An adapter's folder; None where nobody knows it."""
        folder = self.folders.get(name)
        for finder in self.finders if folder is None else ():
            found = finder(name)
            if found is not None:
                return Path(found).absolute()
        return folder


def stamp_of(folder: Path) -> Stamp:
    """What an adapter's files are now, without reading them.

    Raises:
        FileNotFoundError: they are gone.
    """
    found = []
    for name in FILE_NAMES:
        try:
            told = os.stat(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        found.append((name, told.st_ino, told.st_size, told.st_mtime_ns))
    if not found or found[0][0] != CONFIG_NAME:
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME} any more")
    return tuple(found)


def gone(name: str, error: FileNotFoundError, is_registered: bool) -> FileNotFoundError:
    """What an adapter's user is told where its files are missing, and a function knows it or it was registered."""
    if not is_registered:
        return FileNotFoundError(f"adapter {name!r} is not where the function says that was registered: {error}")
    return FileNotFoundError(
        f"adapter {name!r} was registered, and its files are gone: {error}. Put them back, or delete_adapter it"
    )


def read_whole(name: str, folder: Path, is_registered: bool) -> tuple[Checkpoint, Stamp]:
    """An adapter as its files say it, which were not written to meanwhile, and what they were.

    Args:
        name: the adapter's.
        folder: where it is.
        is_registered: whether it was registered by name; else a function knows it.

    Raises:
        FileNotFoundError: its files are gone.
        ValueError: they are damaged or of another kind, or written to each time.
    """
    for _ in range(_TRIES):
        try:
            stamp = settled_stamp_of(folder)
            checkpoint = read_checkpoint(folder)
            is_whole = stamp_of(folder) == stamp
        except FileNotFoundError as error:
            raise gone(name, error, is_registered) from error
        except ValueError as error:
            raise ValueError(f"adapter {name!r} was registered, and cannot be read: {error}") from error
        if is_whole:
            return checkpoint, stamp
    raise ValueError(f"adapter {name!r}: {folder} is being written while it is read: ask for it again")


def settled_stamp_of(folder: Path) -> Stamp:
    """The same, once it was a while ago that they changed: what is written later has another time then.

    File systems tell time in steps of some milliseconds, within which a file can change and be as long as before.
    """
    stamp = stamp_of(folder)
    young = _SETTLED - (time.time_ns() - max(changed for *_, changed in stamp)) / 1e9
    if not 0 < young <= _SETTLED:  # a clock that is ahead of ours says nothing
        return stamp
    time.sleep(young)
    return stamp_of(folder)


def _inside(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"{str(root)!r} is no folder: give the one that holds the adapters' folders")
    if (root / CONFIG_NAME).exists():
        raise ValueError(f"{root} is an adapter itself: give the folder around it, or {{{root.name!r}: {str(root)!r}}}")
    folders, deeper = adapter_folders(root)
    found = {folder.name: folder for folder in folders}
    nested = f"{some(deeper)}: name these by a mapping, {{name: folder}}"
    if not found:
        there = f"; folders inside do, {nested}" if deeper else ": there is no adapter to register"
        raise FileNotFoundError(f"no folder in {root} holds an {CONFIG_NAME}{there}")
    if deeper:
        warnings.warn(f"register({str(root)!r}) leaves out adapters that lie one folder deeper, {nested}", stacklevel=4)
    return found


def _checked(name: object, folder: str | Path) -> Path:
    if not isinstance(name, str) or not name:
        raise ValueError(f"an adapter's name must be a string that is not empty, got {name!r}")
    if not isinstance(folder, str | Path):
        raise TypeError(f"adapter {name!r} is to be in {folder!r}, which is no path of a folder")
    if not (Path(folder) / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"adapter {name!r} is not in {str(folder)!r}: there is no {CONFIG_NAME}")
    return Path(folder).absolute()
