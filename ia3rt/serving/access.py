"""Which folders a client may name: whoever asks for answers must not reach whatever the server can read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ia3rt.adapters.folder import local_folder
from ia3rt.adapters.shortened import ECHO, short
from ia3rt.serving.limits import FILES

MOST_PATH = 4_096
"""Characters of a path, as on Linux."""
MOST_NAME = 255
"""Bytes of a file's or folder's name, as on Linux."""


class ForbiddenPathError(PermissionError):
    """A client named a folder that clients may not load from."""


def folder_of(path: str, allowed: Path | None) -> Path:
    """The folder that a client's `lora_path` means.

    Args:
        path: a folder, or the id of a repository on the Hugging Face Hub.
        allowed: the only folder that it may be in, and its files too, wherever links lead; None for any.

    Raises:
        ForbiddenPathError: it is not in there.
        FileNotFoundError: there is no adapter.
        ValueError: it is no path.
    """
    if not path.isprintable() or len(path) > MOST_PATH:
        raise ValueError(f"lora_path {shown(path)} is no path: it has {len(path):,} characters, or one of control")
    given = Path(os.path.expanduser(path))
    if allowed is not None:
        inside = [given, *(given / name for name in FILES)]
        if not is_within(allowed, inside):
            raise ForbiddenPathError(
                f"lora_path {shown(path)} is not in the folder that adapters may be loaded from here: ask the operator "
                "to put the adapter there"
            )
    return local_folder(given if path.startswith("~") else path)


def is_within(root: Path, paths: Iterable[Path]) -> bool:
    """Whether paths are in a folder, wherever links lead."""
    try:
        top = root.resolve(strict=True)
        return all(path.resolve().is_relative_to(top) for path in paths)
    except (OSError, ValueError, RuntimeError):  # no such folder, an endless chain of links, a name that is none
        return False


def is_name_within(root: Path, name: str) -> bool:
    """Whether an adapter's name means a folder in `root`, and is the one way to write it."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name != "/".join(parts) or not name.isprintable():
        return False
    if any(len(part.encode()) > MOST_NAME for part in parts):  # what is printable has no half characters
        return False
    return is_within(root, [root / name, *(root / name / file for file in FILES)])


def shown(text: str, most: int = ECHO) -> str:
    """What a client sent, as an error or a log repeats it: short, in quotes, and without what no terminal can show."""
    return repr(short(text, most))
