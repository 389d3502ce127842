"""A batch whose rows wear adapters by popularity."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ia3rt.bench.suites.case import Case, Suite, by_subject
from ia3rt.bench.suites.graphs import in_graph

POPULARITY = ("identical", "distinct", "uniform", "zipf")


def worn(popularity: str, rows: int, adapters: int) -> list[str]:
    """The adapter of each row.

    identical: one for all; distinct: another in each row; uniform: any, equally often; zipf: the k-th most popular in
    proportion to 1/k.
    """
    generator = torch.Generator().manual_seed(rows)
    if popularity == "identical":
        chosen = torch.zeros(rows, dtype=torch.long)
    elif popularity == "distinct":
        chosen = torch.arange(rows) % adapters
    else:
        shares = torch.ones(adapters) if popularity == "uniform" else 1 / torch.arange(1, adapters + 1)
        chosen = torch.multinomial(shares, rows, replacement=True, generator=generator)
    return [f"task{position}" for position in chosen.tolist()]


def _cases(quick: bool) -> Iterator[Case]:
    length, adapters = (4, 8) if quick else (16, 64)
    for rows in (4,) if quick else (1, 4, 16, 64):
        for popularity in ("distinct", "zipf") if quick else POPULARITY:
            yield _case(rows, length, popularity, adapters)


def _case(rows: int, length: int, popularity: str, adapters: int) -> Case:
    names = worn(popularity, rows, adapters)
    ways = by_subject(lambda workshop, subject: subject.mixed(workshop.ids(rows, length), names), adapters)
    return Case(popularity, {"rows": rows, "length": length}, ways, work=rows * length, unit="tokens")


SUITE = Suite(
    "mixed",
    "A forward in which each row wears its own adapter: one for all, all distinct, uniform, or by Zipf's law. PEFT "
    "knows one adapter for all rows, so it runs the rows of each adapter one after another.",
    _cases,
    x="rows",
    in_graph=in_graph,
)
