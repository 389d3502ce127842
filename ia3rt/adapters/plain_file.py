"""Opens a file of an adapter, and nothing that only looks like one: a pipe never ends, a device may never begin."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_plain(file: Path) -> int:
    """Returns how many bytes a file holds, without opening it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file.
    """
    return _size(file, os.stat(file))


@contextmanager
def opened(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, opened for reading, and how many bytes it holds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file.
    """
    check_plain(file)  # opening a device may already do something
    # Not waiting: a pipe that took the file's place meanwhile would be waited for, for a writer that may never come.
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        yield stream, _size(file, os.fstat(stream.fileno()))


def read_plain(file: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Args:
        file: where it is.
        most: how many bytes it may hold.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file, or holds more.
    """
    with opened(file) as (stream, size):
        content = b"" if size > most else stream.read(most + 1)  # some of the kernel's files say 0 and never end
        if max(size, len(content)) > most:
            raise ValueError(f"{file} is too large: {max(size, len(content)):,} bytes, and {most:,} are the most")
        return content


def _size(file: Path, found: os.stat_result) -> int:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ValueError(f"{file} is {kind}: an adapter's files are regular files")
    return found.st_size
