"""Compares IA³ adapters pair by pair: whether they act at the same places, and whether they pull the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ia3rt.adapters.checkpoint import Checkpoint
from ia3rt.adapters.site import SiteKey
from ia3rt.cli.inspection import Description, describe, group_names


@dataclass(frozen=True)
class Agreement:
    """How two adapters' task vectors l - 1 agree. What an adapter lacks counts as zeros.

    Attributes:
        cosine: of the angle between them, over all sites of either; None where one of them is all zeros.
        both_change: how many numbers both change.
        same_sign: the share of these that both change in one direction; None where there are none.
    """

    cosine: float | None
    both_change: int
    same_sign: float | None


@dataclass(frozen=True)
class Comparison:
    """What `ia3rt inspect A B` says about two adapters.

    Attributes:
        adapters: their names.
        shared: how many sites both act at.
        only: how many sites only the first acts at, and only the second.
        misfits: sites where their vectors have different widths: they are of two models.
        same_modules: modules of which both bring their own, so that they cannot be combined.
        overall: over all sites.
        groups: by kind of place, the same module in every layer.
    """

    adapters: tuple[str, str]
    shared: int
    only: tuple[int, int]
    misfits: tuple[str, ...]
    same_modules: tuple[str, ...]
    overall: Agreement
    groups: Mapping[str, Agreement]


@dataclass(frozen=True)
class Compared:
    """Several adapters, each described, and every pair of them.

    Attributes:
        adapters: by name.
        pairs: in the order of the names.
    """

    adapters: Mapping[str, Description]
    pairs: tuple[Comparison, ...]


def compare_all(checkpoints: Mapping[str, Checkpoint]) -> Compared:
    """Describes two or more adapters and compares each pair. It needs no model."""
    pairs = tuple(compare(*each) for each in combinations(checkpoints.items(), 2))
    return Compared({name: describe(checkpoint) for name, checkpoint in checkpoints.items()}, pairs)


def compare(one: tuple[str, Checkpoint], other: tuple[str, Checkpoint]) -> Comparison:
    """Compares two adapters, a name and a checkpoint each, in float64. It needs no model."""
    (name, a), (other_name, b) = one, other
    shared = [key for key in a.vectors if key in b.vectors]
    misfits = [key for key in shared if not _fit(a.vectors[key], b.vectors[key])]
    sites = {key: None for key in (*a.vectors, *b.vectors) if key not in misfits}
    grouped: dict[str, list[SiteKey]] = {}
    for key, group in group_names(sites).items():
        grouped.setdefault(group, []).append(key)
    return Comparison(
        adapters=(name, other_name),
        shared=len(shared),
        only=(len(a.vectors) - len(shared), len(b.vectors) - len(shared)),
        misfits=tuple(f"{path} ({side}put)" for path, side in misfits),
        same_modules=tuple(sorted(a.modules.keys() & b.modules.keys())),
        overall=_agreement(a, b, list(sites)),
        groups={name: _agreement(a, b, keys) for name, keys in grouped.items()},
    )


def render(compared: Compared) -> RenderableType:
    """The comparison as `ia3rt inspect` prints it."""
    parts: list[RenderableType] = [_adapters(compared), Text(), _pairs(compared)]
    if len(compared.pairs) == 1:
        parts += [Text(), _groups(compared.pairs[0])]
    models = {name: each.config.get("base_model_name_or_path") for name, each in compared.adapters.items()}
    if len({model for model in models.values() if model}) > 1:
        parts.append(Text("Their configs name different base models.", style="yellow"))
    for pair in compared.pairs:
        a, b = (_labels(compared)[name] for name in pair.adapters)
        if pair.misfits:
            where = f"{pair.misfits[0]}{', …' if len(pair.misfits) > 1 else ''}"
            parts.append(Text(f"{a} and {b} are of two models: their vectors differ in size at {where}", style="red"))
        if pair.same_modules:
            own = ", ".join(pair.same_modules)
            parts.append(Text(f"{a} and {b} each have their own {own}: they cannot be combined", style="red"))
    return Group(*parts)


def _labels(compared: Compared) -> dict[str, str]:
    """The adapters' last names, where these tell them apart."""
    last = {name: name.rstrip("/").rpartition("/")[2] for name in compared.adapters}
    return last if len(set(last.values())) == len(last) else {name: name for name in last}


def _fit(one: Tensor, other: Tensor) -> bool:
    """Whether they are for one site; of experts, one may have a vector for all and the other one for each."""
    if one.numel() == other.numel():
        return True
    large, small = sorted((one, other), key=Tensor.numel, reverse=True)
    return large.dim() == 3 and len(large) > 1 and large.numel() == len(large) * small.numel()


def _agreement(a: Checkpoint, b: Checkpoint, keys: list[SiteKey]) -> Agreement:
    one, other = _changes(a, b, keys), _changes(b, a, keys)
    lengths = float(one.norm()) * float(other.norm())
    both = (one != 0) & (other != 0)
    count = int(both.sum())
    return Agreement(
        cosine=float(one @ other) / lengths if lengths else None,
        both_change=count,
        same_sign=int((both & (one.sign() == other.sign())).sum()) / count if count else None,
    )


def _changes(adapter: Checkpoint, beside: Checkpoint, keys: list[SiteKey]) -> Tensor:
    """l - 1 at sites, zeros where the adapter lacks one; what is NaN or infinite counts as zeros."""
    parts = [torch.zeros(0, dtype=torch.float64, device="cpu")]
    for key in keys:
        vector, theirs = adapter.vectors.get(key), beside.vectors.get(key)
        numbers = max(each.numel() for each in (vector, theirs) if each is not None)
        if vector is None:
            parts.append(torch.zeros(numbers, dtype=torch.float64, device="cpu"))
            continue
        change = vector.reshape(-1).double() - 1.0
        parts.append(torch.where(change.isfinite(), change, 0.0).repeat(numbers // change.numel()))
    return torch.cat(parts)


def _adapters(compared: Compared) -> Table:
    labels = _labels(compared)
    table = _table("adapter", "base model", right=("vectors", "numbers", "mean |l-1|", "max |l-1|", "NaN/inf"))
    for name, each in compared.adapters.items():
        statistics = each.statistics
        table.add_row(
            Text(labels[name]),
            Text(str(each.config.get("base_model_name_or_path") or "not said")),
            f"{each.vectors}",
            f"{each.numbers:,}",
            f"{statistics.mean_distance:.4f}",
            f"{statistics.max_distance:.4f}",
            Text(f"{statistics.not_finite}", style="bold red" if statistics.not_finite else ""),
        )
    return table


def _pairs(compared: Compared) -> Table:
    labels = _labels(compared)
    table = _table("pair", right=("sites of both", "only one", "only other", "cosine", "both change", "same sign"))
    for pair in compared.pairs:
        only = (f"{count}" for count in pair.only)
        table.add_row(
            Text(" · ".join(labels[name] for name in pair.adapters)), f"{pair.shared}", *only, *_cells(pair.overall)
        )
    return table


def _groups(pair: Comparison) -> Table:
    table = _table("module", right=("cosine", "both change", "same sign"))
    for name, agreement in pair.groups.items():
        table.add_row(Text(name), *_cells(agreement))
    return table


def _table(*left: str, right: tuple[str, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in left:
        table.add_column(title, overflow="fold")
    for title in right:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _cells(agreement: Agreement) -> tuple[str, str, str]:
    cosine = "-" if agreement.cosine is None else f"{agreement.cosine:.3f}"
    return cosine, f"{agreement.both_change:,}", "-" if agreement.same_sign is None else f"{agreement.same_sign:.1%}"
