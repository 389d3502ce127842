"""A resident adapter: its row of the bank, and what came with its numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from ia3rt.adapters.site import Site, SiteKey

Stamp: TypeAlias = "tuple[tuple[str, int, int, int], ...]"
"""An adapter's files: name, inode, size and the nanosecond of the last change, each."""


@dataclass(eq=False)
class Adapter:
    """A resident adapter. Compared by identity, so that a name used again is not taken for the old adapter.

    Attributes:
        name: what users call it.
        row: its row of the bank.
        sites: where it acts; everywhere else its row is ones.
        shared: at which of them, experts, it has one vector for all; its row has it once for each.
        stamp: of one that was registered, its files as they were read; None of one that was loaded, or trained since.
        keys: of its sites, which every new route asks for.
        is_deleted: whether `Residents.remove` took it out.
        config: the adapter_config.json it came with, empty where it came from none.
        modules: the paths of the model's modules of which it has its own; rows that wear it go through its own.
        embeddings: which of them are saved embeddings, the whole vocabulary of the model that it was trained on.
        free: the bank's free rows, to which its row goes when nothing holds it any more.
    """

    name: str
    row: int
    sites: frozenset[Site]
    config: dict[str, Any] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    free: list[int] = field(default_factory=list, repr=False)
    shared: frozenset[Site] = frozenset()
    stamp: Stamp | None = None
    is_deleted: bool = False
    keys: frozenset[SiteKey] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Asks the sites once."""
        self.keys = frozenset(site.key for site in self.sites)

    def __del__(self) -> None:
        """Frees its row: not when it is deleted, as a forward that wears it may run."""
        self.free.append(self.row)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        """The same in a copy of the bank, whose row is not free as long as this is held."""
        made = memo[id(self)] = Adapter.__new__(Adapter)
        vars(made).update(copy.deepcopy(vars(self), memo))
        if made.row in made.free:
            made.free.remove(made.row)
        return made

    @cached_property
    def site_in_experts(self) -> Site | None:
        """A site at one of a mixture's experts, each a module that does not know whose its rows are; None for none."""
        return next((site for site in self.sites if "experts" in site.path.split(".") and not site.experts), None)
