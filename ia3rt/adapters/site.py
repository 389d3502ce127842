"""What a place is where an IA³ vector can act, and how the names of places are matched."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias

Side: TypeAlias = Literal["in", "out"]
SiteKey: TypeAlias = "tuple[str, Side]"
ModuleNames: TypeAlias = "str | Collection[str]"
"""Which modules are meant: a list or set of names, or one regular expression, as in PEFT's configs."""


@dataclass(frozen=True)
class Site:
    """One place a vector acts: the input or the output of one module.

    Attributes:
        path: the module's dotted name in the model.
        side: `in` scales the module's input, `out` its output (with the bias).
        width: the vector's length: the module's in_features or out_features, or its channels.
        spatial: how many dimensions of what is scaled come after the one that the vector goes over: 0, but those of the
            kernel of a convolution, 2 for a Conv2d.
    """

    path: str
    side: Side
    width: int
    spatial: int = 0

    @property
    def key(self) -> SiteKey:
        """What identifies the site within its model."""
        return self.path, self.side

    def __str__(self) -> str:
        """The site as error messages name it."""
        return f"{self.path} ({self.side}put, width {self.width})"


def name_matches(path: str, names: ModuleNames) -> bool:
    """Whether `path` is meant by `names`: PEFT's rules, but only whole path components match.

    A string is a regular expression for the whole path; anything else holds names, each the whole path or its last
    components. PEFT's feedforward_modules compare raw endings instead, where `fc` also hits `pre_fc`.
    """
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)
