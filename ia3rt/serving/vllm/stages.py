"""Stages of a model in several processes (--pipeline-parallel-size): only the last one's output comes to the scheduler.

So a stage that could not read an adapter says so with what it hands to the next, and the last with its output
(failing.py). The stages cannot ask each other instead: the next one begins a step when this one has ended it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.sequence import IntermediateTensors
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu import model_runner

from ia3rt.serving.vllm.failing import FIELD


def install() -> None:
    """Puts the function of this file in front of the method of both of vLLM's runners."""
    for runner in (gpu_model_runner.GPUModelRunner, model_runner.GPUModelRunner):
        runner.execute_model = _execute_model(runner.execute_model)


def _execute_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any, intermediate_tensors: Any = None, **dummy: Any) -> Any:
        """A stage's step, or one that vLLM tries."""
        manager = getattr(self, "lora_manager", None)
        if manager is None:
            return original(self, scheduler_output, intermediate_tensors, **dummy)
        manager.ia3rt_hands_on = True
        before: set[int] = set()
        if intermediate_tensors is not None:
            before = _taken(intermediate_tensors)
            if self.intermediate_tensors is None:
                # On a CPU vLLM 0.32 makes them only when it warms up, and with adapters it does not.
                self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                    batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
                )
        output = original(self, scheduler_output, intermediate_tensors, **dummy)
        unreadable = getattr(manager, FIELD) | before
        setattr(manager, FIELD, unreadable)
        if unreadable and isinstance(output, IntermediateTensors):
            return IntermediateTensors({**output.tensors, FIELD: _handed(unreadable)})
        return output

    return execute_model


def _handed(numbers: set[int]) -> torch.Tensor:
    """Adapters' numbers as a tensor that vLLM sends whole: one that its processes' number divides it would cut."""
    told = sorted(numbers)
    told += [told[0]] * (1 - len(told) % get_tp_group().world_size)
    return torch.tensor(told, dtype=torch.int32, device="cpu")


def _taken(given: IntermediateTensors) -> set[int]:
    """The numbers that the stage before could not read; the tensors are then those that vLLM expects."""
    told = given.tensors.pop(FIELD, None)
    return set() if told is None else set(told.tolist())
