"""What is set on an object for a while, in the place of what other code set on it, which comes back afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def set_on(owner: object, key: str, own: Mapping[str, Any], hidden: Iterable[str] = ()) -> None:
    """Sets attributes on an object itself until `take_off`, and keeps what stood there.

    Args:
        owner: the object.
        key: of the attribute that keeps it.
        own: what is set, by name.
        hidden: names of what is only taken away, so that the class's shows.
    """
    held = vars(owner)
    held[key] = own, {name: held.pop(name) for name in (*own, *hidden) if name in held}
    held.update(own)


def before(owner: object, key: str) -> Mapping[str, Any]:
    """What stood there before, by name."""
    kept: tuple[Any, Mapping[str, Any]] = vars(owner).get(key, ({}, {}))
    return kept[1]


def take_off(owner: object, key: str) -> None:
    """Ends what `set_on` began, if it did; what other code has set since stays."""
    own, stood = vars(owner).pop(key, ({}, {}))
    for name, value in own.items():
        if vars(owner).get(name) is value:
            del vars(owner)[name]
    for name, value in stood.items():
        vars(owner).setdefault(name, value)
