"""Weights that are split over processes: by FSDP, which joins them for a forward, or by tensor parallelism."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from ia3rt.routing.averaging import is_flattened


def is_distributed(x: object) -> bool:
    """Whether x is a tensor of several processes, each with a part of it or with all."""
    # Without the module there is no such tensor; importing it takes a while.
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def is_split(layer: nn.Module) -> bool:
    """Whether a process holds only a part of the layer's weight, outside of a forward at least."""
    return any(map(is_distributed, layer.parameters(False)))


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that fully_shard was called with."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel, which came before fully_shard, is around a part of a model, or around all."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    # Around all, it is no module of the model's: then it shows in the parameters that it was given.
    is_within = any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules())
    return is_within or any(map(is_flattened, model.parameters()))


def is_tensor_parallel(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether the layer at `path` computes with a part of its weight: its vectors are split as that is.

    Args:
        modules: the model's, by path.
        path: the layer's.
    """
    if not is_split(modules[path]):
        return False
    parts = path.split(".")
    around = [modules[".".join(parts[:end])] for end in range(len(parts) + 1)]
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not any(isinstance(each, fsdp.FSDPModule) for each in around):
        return True
    # FSDP splits in one dimension of the processes, and may repeat that in another; what is split twice is both.
    placed: Any = [getattr(each, "placements", ()) for each in modules[path].parameters(False)]
    return any(sum(not each.is_replicate() for each in placements) > 1 for placements in placed)
