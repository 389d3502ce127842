"""A forward pre-hook before those that are there, also for a compiler that looks at the dictionary of hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def register_first(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """What `register_forward_pre_hook(hook, prepend=True)` does, and the hooks are put in anew in their order.

    Torch 2.11's dynamo names a hook by its place among the keys as a dict gives them, in the order in which they were
    put in, and finds it in the order of the OrderedDict, which `prepend` changes: its guards then read another hook.
    """
    handle = module.register_forward_pre_hook(hook)
    hooks = module._forward_pre_hooks
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)
    return handle
