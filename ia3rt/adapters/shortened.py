"""What errors repeat of what they were given."""

from __future__ import annotations

ECHO = 80
"""Characters of a client's own that an error repeats: it is answered, and logged, as often as it is sent."""


def short(given: object, most: int = ECHO) -> str:
    """What was given, as an error may repeat it: at most `most` characters of it."""
    text = given if isinstance(given, str) else repr(given)
    return text if len(text) <= most else text[: most - 1] + "…"
