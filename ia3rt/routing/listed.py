"""Numbers that users give in a list, an array or a tensor."""

from __future__ import annotations

from typing import Any


def listed(given: Any) -> Any:
    """A tensor's or an array's numbers in lists; anything else as it is."""
    return given.tolist() if hasattr(given, "tolist") else given
