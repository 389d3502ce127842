"""What the options of `ia3rt bench` and `ia3rt bench serve` have in common."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from ia3rt.cli.errors import UsageError

T = TypeVar("T")


def split(names: str) -> list[str]:
    """The names of a list as it is typed, with commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def known(option: str, wanted: Sequence[str], all_names: Iterable[str]) -> list[str]:
    """What is wanted, in the order of what is known.

    Raises:
        UsageError: a name is not known, or none is wanted.
    """
    names = list(all_names)
    if not wanted:
        raise UsageError(option, f"names none: known are {', '.join(names)}")
    for name in wanted:
        if name not in names:
            raise UsageError(option, f"there is no {name!r}: known are {', '.join(names)}")
    return [name for name in names if name in wanted]


def matching(pattern: str, cases: Sequence[T], name: Callable[[T], Any] = str) -> list[T]:
    """The cases whose names match, as file names do.

    Raises:
        UsageError: there are cases, and none matches.
    """
    chosen = [case for case in cases if fnmatch.fnmatchcase(name(case), pattern)]
    if cases and not chosen:
        there_are = ", ".join(repr(name(case)) for case in cases)
        raise UsageError("--cases", f"no case is named {pattern!r}: there are {there_are}")
    return chosen
