"""What a place is where an IA³ vector can act, and how the names of places are matched."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Side: TypeAlias = Literal["in", "out"]
SiteKey: TypeAlias = "tuple[str, Side]"
ModuleNames: TypeAlias = "str | Collection[str]"
"""Which modules are meant: a list or set of names, or one regular expression, as in PEFT's configs."""
SlicedNames: TypeAlias = "Mapping[str, Collection[str] | None]"
"""Names of modules, each with the slices of its output that are meant, as {"c_attn": ("k", "v")}; None for all."""


@dataclass(frozen=True)
class Slices:
    """The part of a fused layer's output that a vector may scale.

    Attributes:
        names: what it is: some of q, k and v, or of gate and up.
        columns: where it is: [start, stop) each, ascending.
    """

    names: tuple[str, ...]
    columns: tuple[tuple[int, int], ...]

    def inside(self, device: torch.device | None = None) -> Tensor:
        """Its columns, int64, ascending."""
        return torch.cat([torch.arange(*each, device=device) for each in self.columns])

    def outside(self, width: int) -> Tensor:
        """The columns, of so many, that are none of its: int64, ascending."""
        rest = torch.ones(width, dtype=torch.bool, device="cpu")
        rest[self.inside()] = False
        return rest.nonzero().flatten()


@dataclass(frozen=True)
class Site:
    """One place a vector acts: the input or the output of one module.

    Attributes:
        path: the module's dotted name in the model; at experts that are kept as one tensor, that tensor's.
        side: `in` scales the module's input, `out` its output (with the bias).
        width: the vector's length: the module's in_features or out_features, or its channels; at experts those of all
            of them.
        experts: how many experts have a vector of their own there, one after another; 0 at a layer.
        parameter: of experts, the tensor's name in their module; empty at a layer.
        slices: the part of it that may differ from ones; None where all of it may.
        spatial: how many dimensions of what is scaled come after the one that the vector goes over: 0, but those of the
            kernel of a convolution, 2 for a Conv2d.
    """

    path: str
    side: Side
    width: int
    experts: int = 0
    parameter: str = ""
    slices: Slices | None = None
    spatial: int = 0

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
        of = "" if self.slices is None else f", of which {' and '.join(self.slices.names)}"
        return f"{self.path} ({self.side}put, {width}{of})"


def name_matches(path: str, names: ModuleNames) -> bool:
    """Whether `path` is meant by `names`: PEFT's rules, but only whole path components match.

    A string is a regular expression for the whole path; anything else holds names, each the whole path or its last
    components. PEFT's feedforward_modules compare raw endings instead, where `fc` also hits `pre_fc`.
    """
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def check_names(argument: str, names: object) -> None:
    """Sees to it that `names` are such as `name_matches` takes, or a mapping of them to slices, or None.

    Raises:
        ValueError: they are not: `argument` is what they were given as.
    """
    if names is None:
        return
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ValueError(
                f"{argument}={names!r} is no regular expression, as which a string is read: {error}. Names go in a list"
            ) from None
        return
    wrong = [each for each in names if not isinstance(each, str)] if isinstance(names, Collection) else [names]
    if wrong:
        raise ValueError(
            f"{argument}={names!r}: modules are named by a list or set of strings, or by one string, a regular "
            f"expression, and {wrong[0]!r} is of type {type(wrong[0]).__name__}"
        )
    assert isinstance(names, Collection)
    for name, slices in names.items() if isinstance(names, Mapping) else ():
        is_known = slices is None or (isinstance(slices, Collection) and all(isinstance(each, str) for each in slices))
        if not is_known:
            raise ValueError(
                f"{argument} gives {name!r} the slices {slices!r}: they are some of their names, as ('k', 'v'), or "
                "None for the whole module"
            )
