"""Whether adapters of a model can be trained where their vectors act."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ia3rt.adapters.adapter import Adapter
from ia3rt.modules.offloading import execution_device
from ia3rt.modules.sharding import fsdp_modules, is_fully_sharded, is_tensor_parallel
from ia3rt.routing.training import check_names


def check_trainable(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Checks that adapters can be trained.

    Raises:
        ValueError: the model is in FullyShardedDataParallel, or tensor-parallel; one acts at an offloaded module, or
            has modules of its own beside a model that FSDP splits; or a name is in the way.
    """
    if is_fully_sharded(model):
        raise ValueError(
            f"adapter {adapters[0].name!r} cannot be trained: the model is in FullyShardedDataParallel (FSDP1), which "
            "averages gradients over processes only of parameters that it was given before, so that each process would "
            "learn another adapter. Load the model anew, and use fully_shard (FSDP2) or DistributedDataParallel"
        )
    is_sharded = bool(fsdp_modules(model))
    modules = dict(model.named_modules())
    parallel = next((path for path in modules if is_tensor_parallel(modules, path)), None)
    if parallel is not None:
        raise ValueError(
            f"module {parallel!r} is tensor-parallel, and ia3rt does not train beside it: each process would see "
            "the gradients of its parts only. Train on a model without tp_plan; FSDP (fully_shard) can be used"
        )
    for adapter in adapters:
        if is_sharded and adapter.modules:
            raise ValueError(
                f"adapter {adapter.name!r} has its own {sorted(adapter.modules)}, whose gradients FSDP, which "
                "splits the model's, would not bring together: train it on a model without FSDP"
            )
        for site in adapter.sites:
            if execution_device(model.get_submodule(site.module)) is not None:
                raise ValueError(
                    f"adapter {adapter.name!r} acts at {site}, whose weights accelerate offloads: it would look "
                    "for the adapter's parameter among them: load the model without offloading to train"
                )
    check_names(model, adapters)
