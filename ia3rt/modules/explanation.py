"""Says of each site of a patched model what applies its vector, and why that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from ia3rt.adapters.given import check_model
from ia3rt.adapters.site import Site
from ia3rt.modules.wearer import How, Wearer
from ia3rt.routing.route import Backend
from ia3rt.routing.routing import Routing


@dataclass(frozen=True)
class SiteExplanation:
    """What applies one site's vector.

    Attributes:
        site: the site.
        backend: the runtime's backend.
        kernel: the operation that the vector is part of.
        config: how that is launched; empty where there is nothing to choose.
        why: why this one.
    """

    site: Site
    backend: Backend
    kernel: str
    config: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """What applies each vector of a model. Printed, it shows sites that differ in a layer's number only as one.

    Attributes:
        sites: one for each site, in the order of the bank.
        rows: for how many rows the kernels were chosen.
    """

    sites: tuple[SiteExplanation, ...]
    rows: int

    def __str__(self) -> str:
        """The table, 120 columns wide."""
        console = Console(width=120)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def __rich__(self) -> Table:
        """The table, for rich."""
        backend = " and ".join(sorted({entry.backend for entry in self.sites}))
        table = Table(
            title=f"{len(self.sites)} sites, {backend} backend, {self.rows} rows", box=None, title_justify="left"
        )
        table.add_column("site", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
        for title in ("kernel", "config", "why"):
            table.add_column(title, overflow="fold")
        for (path, side, *how), count in self._alike():
            table.add_row(Text(f"{path} ({side})"), f"× {count}", *map(Text, how))
        return table

    def _alike(self) -> Iterator[tuple[tuple[str, ...], int]]:
        counts: dict[tuple[str, ...], int] = {}
        for entry in self.sites:
            path = re.sub(r"(?<=\.)\d+(?=\.)", "N", entry.site.path)
            key = (path, entry.site.side, entry.kernel, entry.config, entry.why)
            counts[key] = counts.get(key, 0) + 1
        yield from counts.items()


def explain(model: nn.Module, rows: int = 1) -> Explanation:
    """Says, site by site, which kernel applies the vector, how it is launched, and why.

    Args:
        model: a patched model.
        rows: of a forward: the batch's sequences times their new tokens. Kernels are chosen by it.

    Raises:
        ValueError: the model is not patched.
        TypeError: it is no model.
    """
    check_model(model, "explain")
    wearers = [module for module in model.modules() if isinstance(module, Wearer)]
    if not wearers and "ia3_runtime" in vars(model):
        return Explanation((), rows)  # its sites come with its adapters
    if not wearers:
        raise ValueError("the model is not patched: call ia3rt.patch(model) first")
    routing: Routing = wearers[0].ia3_routing
    found: dict[int, How] = {}
    for module in wearers:  # those around a layer come before it, and say what they take over
        found = module.ia3_hows(rows) | found
    sites = list(routing.bank.sites.values())
    entries = (SiteExplanation(sites[position], routing.backend, *how) for position, how in sorted(found.items()))
    return Explanation(tuple(entries), rows)
