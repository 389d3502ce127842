"""Batches by popularity, mix tables and banks for them: what the tests and the benchmarks run."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

POPULARITY = ("identical", "distinct", "uniform", "zipf", "one_identity")
PRODUCT, LINEAR = 0, 1


class Mix(NamedTuple):
    """A mode, the bank rows of its adapters, and their weights (which a product ignores)."""

    mode: int
    ids: Sequence[int]
    weights: Sequence[float] = ()


def popularity(name: str, rows: int, slots: int, generator: torch.Generator | None = None) -> Tensor:
    """Return int32 [rows], the mix of each row, by how popular the mixes are; slot 0 is the identity.

    identical: one mix; distinct: another mix in each row, as far as they go; uniform: any, equally often; zipf: the
    k-th most popular is worn in proportion to 1/k; one_identity: distinct, but for one row in the middle.
    """
    worn = max(slots - 1, 1)
    if name == "identical":
        route = torch.full((rows,), slots - 1)
    elif name in ("distinct", "one_identity"):
        route = 1 + torch.arange(rows) % worn
    elif name == "uniform":
        route = 1 + torch.randint(worn, (rows,), generator=generator)
    elif name == "zipf":
        route = 1 + torch.multinomial(1 / torch.arange(1, worn + 1), rows, replacement=True, generator=generator)
    else:
        raise ValueError(f"no popularity {name!r}; there are {', '.join(POPULARITY)}")
    if name == "one_identity":
        route[rows // 2] = 0
    return route.to(torch.int32)


def mix_table(mixes: Sequence[Mix], size: int | None = None) -> Tensor:
    """Return the int32 table [slots, 2 + 2K]; K is `size`, or the longest mix. What lies past a mix's end is wrong."""
    size = max(len(mix.ids) for mix in mixes) if size is None else size
    table = torch.zeros(len(mixes), 2 + 2 * size, dtype=torch.int32)
    table[:, 2 : 2 + size] = 1  # as after a longer mix: a row's count has to be heeded
    table[:, 2 + size :] = torch.tensor(3.0).view(torch.int32)
    for row, mix in zip(table, mixes, strict=True):
        count = len(mix.ids)
        row[0], row[1] = mix.mode, count
        row[2 : 2 + count] = torch.tensor(mix.ids, dtype=torch.int32)
        weights = torch.tensor(mix.weights, dtype=torch.float32)
        row[2 + size : 2 + size + len(weights)] = weights.view(torch.int32)
    return table


def random_mixes(slots: int, capacity: int, longest: int, generator: torch.Generator) -> Tensor:
    """Return a table of products and, every third, linear mixes of 1 to `longest` adapters; slot 0 is the identity."""
    mixes = [Mix(PRODUCT, ())]
    for slot in range(1, slots):
        count = 1 + slot % longest
        ids = (1 + torch.randperm(capacity - 1, generator=generator)[:count]).tolist()
        weights = torch.randn(count, generator=generator).tolist()
        mixes.append(Mix(LINEAR if slot % 3 == 0 else PRODUCT, ids, weights))
    return mix_table(mixes, longest)


def random_bank(
    capacity: int, width: int, generator: torch.Generator, dtype: torch.dtype = torch.float32, before: int = 0
) -> Tensor:
    """Return one site's slice [capacity, width] of a wider bank, `before` columns from its left edge.

    Vectors are near one, as trained ones are; what surrounds the slice is NaN.
    """
    bank = torch.full((capacity, before + width + 5), float("nan"), dtype=dtype)
    site = bank[:, before : before + width]
    site.copy_(1 + 0.5 * torch.randn(capacity, width, generator=generator))
    site[0] = 1
    return site
