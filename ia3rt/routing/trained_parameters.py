"""Parameters that training registers in a model's modules, and what other code puts in their place by their names."""

from __future__ import annotations

import torch
from torch import nn


def unregistered(name: str, adapter: str, where: str) -> RuntimeError:
    """The error where there is none: other code computes it, which only who reads the attribute would see.

    Args:
        name: the parameter's in its module.
        adapter: the name of the adapter that is trained.
        where: the place that it is of.
    """
    return RuntimeError(
        f"adapter {adapter!r} is trained, and its {name!r} at {where} is no parameter any more: other code computes it "
        "(torch.nn.utils.parametrize, prune) or took it away, and a forward would not go by that. Take it off again "
        f"(parametrize.remove_parametrizations(module, {name!r}), prune.remove), or call end_training(), which keeps "
        "the numbers that it gives now"
    )


def make_plain(module: nn.Module, name: str) -> None:
    """Makes a parameter again of what other code computes by that name, with the numbers that it gives now."""
    from torch.nn.utils import parametrize, prune  # not before: most never need it

    if parametrize.is_parametrized(module, name):
        parametrize.remove_parametrizations(module, name)
    if any(_prunes(hook, name) for hook in module._forward_pre_hooks.values()):
        prune.remove(module, name)  # type: ignore[no-untyped-call]


def _prunes(hook: object, name: str) -> bool:
    return isinstance(hook, torch.nn.utils.prune.BasePruningMethod) and hook._tensor_name == name
