"""Gradients of vectors in a model that FSDP splits: it brings together those of the parameters it was given, before."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def mesh_of(model: nn.Module) -> Any:
    """The processes over which a model's weights are split, a DeviceMesh; None where they are not."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    if tensors is None:
        return None
    return next((each.device_mesh for each in model.parameters() if isinstance(each, tensors.DTensor)), None)


def is_flattened(tensor: object) -> bool:
    """Whether FullyShardedDataParallel joins a parameter with others into one, for forwards that it begins itself.

    It puts views of that one in their places meanwhile, by which gradients go to it; it is not averaged else.
    """
    return bool(getattr(tensor, "_fsdp_flattened", False))


class Averaging:
    """Makes each gradient the mean over processes, at the end of each backward pass that reaches one of them.

    All at once, in one exchange: so processes whose rows wear different adapters wait for each other nowhere else. A
    parameter that no process reached keeps no gradient. What was accumulated before is the same everywhere, and stays.

    Args:
        mesh: the processes.
    """

    def __init__(self, mesh: Any) -> None:
        self._mesh = mesh
        self._parameters: list[nn.Parameter] = []
        self._hooks: list[Any] = []
        self._is_queued = False

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Says whose gradients these are, alike in all processes and in one order; no others from now on."""
        self._parameters = list(parameters)
        for hook in self._hooks:
            hook.remove()
        self._hooks = [each.register_post_accumulate_grad_hook(self._reached) for each in self._parameters]  # type: ignore[no-untyped-call]

    def _reached(self, parameter: Tensor) -> None:
        if not self._is_queued:
            self._is_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._is_queued = False
        own = [each.new_zeros(each.shape) if each.grad is None else each.grad for each in self._parameters]
        reached = own[0].new_tensor([float(each.grad is not None) for each in self._parameters])
        numbers = torch.cat([*own, reached])
        for dim in range(self._mesh.ndim):
            torch.distributed.all_reduce(numbers, group=self._mesh.get_group(dim))
        *means, counts = torch.split(numbers, [*(each.numel() for each in own), len(own)])
        for parameter, mean, count in zip(self._parameters, means, counts.tolist(), strict=True):
            if count:
                parameter.grad = mean / self._mesh.size()
