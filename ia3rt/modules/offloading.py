"""What accelerate has hung on a module, and where that brings its weights for a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HUNG_ON = ("_hf_hook", "_old_forward", "forward")
"""What accelerate's add_hook_to_module puts into a module."""


def execution_device(module: nn.Module) -> torch.device | None:
    """The device that accelerate brings a module's weights to for its forward; None where it offloads none."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # SequentialHook has several
        if getattr(each, "offload", False) and each.execution_device is not None:
            return torch.empty(0, device=each.execution_device).device  # "cuda" is the current one
    return None
