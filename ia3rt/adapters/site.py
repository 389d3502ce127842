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
        path: the module's dotted name in the model; at experts that are kept as one tensor, that tensor's.
        side: `in` scales the module's input, `out` its output (with the bias).
        width: the vector's length: the module's in_features or out_features; at experts those of all of them.
        experts: how many experts have a vector of their own there, one after another; 0 at a layer.
        parameter: of experts, the tensor's name in their module; empty at a layer.
    """

    path: str
    side: Side
    width: int
    experts: int = 0
    parameter: str = ""

    @property
    def module(self) -> str:
        """The dotted name of the module that wears the vector."""
        return self.path.removesuffix(f".{self.parameter}") if self.parameter else self.path

    @property
    def width_of_one(self) -> int:
        """The length of one expert's vector, and of one that all experts share; at a layer `width`."""
        return self.width // (self.experts or 1)

    @property
    def key(self) -> SiteKey:
        """What identifies the site within its model."""
        return self.path, self.side

    def __str__(self) -> str:
        """The site as error messages name it."""
        width = f"{self.experts} experts × width {self.width_of_one}" if self.experts else f"width {self.width}"
        return f"{self.path} ({self.side}put, {width})"


def name_matches(path: str, names: ModuleNames) -> bool:
    """Whether `path` is meant by `names`: PEFT's rules, but only whole path components match.

    A string is a regular expression for the whole path; anything else holds names, each the whole path or its last
    components. PEFT's feedforward_modules compare raw endings instead, where `fc` also hits `pre_fc`.
    """
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)
