"""Amounts of memory as users write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?B)\s*")


def bytes_of(size: int | str, what: str) -> int:
    """The bytes that "64MB" or "1.5GiB" mean, as in the `max_memory` of accelerate; a number means itself.

    Args:
        size: what the user gave.
        what: what it is for, for errors.

    Raises:
        ValueError: it is no amount.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _SIZE.fullmatch(size.upper()) if isinstance(size, str) else None
    if found is None or found[2] not in _UNITS:
        raise ValueError(f'{what} is {size!r}: give bytes, or text such as "64MB" or "1.5GiB"')
    return int(float(found[1]) * _UNITS[found[2]])
