"""Which of several modules each row of a batch goes through: the model's own, or one that its adapter brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ia3rt.adapters.adapter import Adapter
from ia3rt.adapters.outside_modes import outside_modes
from ia3rt.adapters.resolved import ResolvedMix
from ia3rt.routing.route import Route


class Choice:
    """What the rows of one route go through, in the place of one module.

    Attributes:
        modules: the distinct ones; None is the model's own.
        index: int64 [rows] on the CPU, which of `modules` each row goes through; None where all go through the first.
    """

    def __init__(self, modules: tuple[nn.Module | None, ...], index: Tensor | None) -> None:
        self.modules = modules
        self.index = index
        self._rows: dict[torch.device, tuple[Tensor, ...]] = {}

    @outside_modes
    def rows(self, device: torch.device) -> tuple[Tensor, ...]:
        """On a device, for each of `modules` the rows that go through it, int64 [its rows]."""
        if device not in self._rows:
            index = self.index
            assert index is not None
            slots = range(len(self.modules))
            self._rows[device] = tuple((index == slot).nonzero().flatten().to(device) for slot in slots)
        return self._rows[device]


@outside_modes
def choose(route: Route, path: str, own: Mapping[Adapter, nn.Module]) -> Choice:
    """What each row of a route goes through at the module at `path`.

    Args:
        route: what the rows wear.
        path: the module's.
        own: the adapters' own, of those that have one.

    Raises:
        ValueError: as `check_rows`.
        RuntimeError: an adapter was deleted while this forward wears it.
    """
    for mix in route.mixes:
        for adapter in mix.adapters:
            if path in adapter.modules and adapter not in own:
                raise RuntimeError(
                    f"adapter {adapter.name!r}, which has its own {path!r}, was deleted while a forward wears it"
                )
    modules = [_module(mix, own) for mix in route.mixes]
    if route.index is None:
        return Choice((modules[0],), None)
    used = [modules[slot] for slot in route.used]
    distinct = list({id(module): module for module in used}.values())
    if len(distinct) == 1:
        return Choice((distinct[0],), None)
    if route.by_token:
        raise ValueError(_by_token(path))
    place = {id(module): slot for slot, module in enumerate(distinct)}
    return Choice(
        tuple(distinct), torch.tensor([place[id(modules[mix])] for mix in route.index.tolist()], device="cpu")
    )


def check_rows(mixes: Sequence[Sequence[Adapter]], index: Tensor | None, starts: Sequence[int] | None) -> None:
    """Checks that rows can wear different mixes: before an adapter makes room for one that is refused then.

    Args:
        mixes: the adapters of each row's; with `index`, of those that it points to.
        index: int64 [rows] or [rows, tokens]; None where each row has one of `mixes`.
        starts: of each row, the position of the first token that wears its mix; None where all tokens do.

    Raises:
        ValueError: an adapter acts inside the experts of a mixture; tokens of one row would go through different
            modules of their adapters' own, or rows through different saved embeddings.
    """
    has_own = False
    for adapters in mixes:
        for adapter in adapters:
            has_own = has_own or bool(adapter.modules)
            if adapter.site_in_experts is not None:
                raise ValueError(
                    f"adapter {adapter.name!r} acts at {adapter.site_in_experts}, inside a mixture's experts, where "
                    "the rows of the batch are mixed up: it can be worn by all rows (set_adapter), not by some"
                )
    if not has_own:
        return
    worn = list(mixes) if index is None else [mixes[at] for at in sorted(set(index.flatten().tolist()))]
    begins_later = starts is not None and any(starts)
    if begins_later:
        worn.append(())  # the tokens before
    for path in sorted({path for adapters in worn for adapter in adapters for path in adapter.modules}):
        owners = dict.fromkeys(next((each for each in adapters if path in each.modules), None) for adapters in worn)
        if len(owners) == 1:
            continue
        for owner in owners:
            if owner is not None and path in owner.embeddings:
                raise ValueError(
                    f"adapter {owner.name!r} has saved embeddings at {path!r}: they are the vocabulary of the whole "
                    "model, its size included, so they are worn by all rows (set_adapter) or by none"
                )
        if begins_later or (index is not None and index.dim() == 2):
            raise ValueError(_by_token(path))


def _module(mix: ResolvedMix, own: Mapping[Adapter, nn.Module]) -> nn.Module | None:
    return next((own[adapter] for adapter in mix.adapters if adapter in own), None)


def _by_token(path: str) -> str:
    return (
        f"adapters of this route have their own module {path!r}: a row goes through one of them, so it can be routed "
        "by row and not by token, nor from a start on"
    )
