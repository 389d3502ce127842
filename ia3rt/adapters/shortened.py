"""What errors repeat of what they were given."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

ECHO = 80
"""Characters of a client's own that an error repeats: it is answered, and logged, as often as it is sent."""
_MOST_TOLD = 12


def short(given: object, most: int = ECHO) -> str:
    """What was given, as an error may repeat it: at most `most` characters of it."""
    text = given if isinstance(given, str) else repr(given)
    return text if len(text) <= most else text[: most - 1] + "…"


def some(names: Collection[str]) -> str:
    """Names as an error tells them; not all of thousands."""
    told = ", ".join(map(repr, islice(names, _MOST_TOLD))) or "none"
    return told if len(names) <= _MOST_TOLD else f"{told} and {len(names) - _MOST_TOLD:,} more"
