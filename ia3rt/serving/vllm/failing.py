"""An adapter that a worker cannot read fails the requests that wear it, and never the step of all the others.

vLLM has no way for that: what is raised in a step ends the engine. So a worker gives the adapter a slot of ones and
says so with the step's output; and the scheduler, before a token of that leaves it, ends the adapter's requests with an
error and forgets their keys and values, which the prefix cache would give to others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerWrapperBase

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is under its own name

FIELD = "ia3rt_unreadable"
"""Of a step's output: the numbers of the adapters that the step could not read, or put on where a layer ran on other
rows than the step's tokens."""


def install() -> None:
    """Puts the functions of this file in front of vLLM's methods."""
    WorkerWrapperBase.execute_model = _execute_model(WorkerWrapperBase.execute_model)
    WorkerWrapperBase.sample_tokens = _sample_tokens  # which vLLM's wrapper finds in the worker
    Scheduler.update_from_output = _update_from_output(Scheduler.update_from_output)


def tell(worker: Any, output: Any) -> Any:
    """Writes onto a step's output which adapters its worker could not read.

    Args:
        worker: vLLM's.
        output: what its step returned, which may be another stage's input, or come later.
    """
    manager = getattr(getattr(worker, "model_runner", None), "lora_manager", None)
    unreadable = frozenset(getattr(manager, FIELD, ()))
    if unreadable and isinstance(output, AsyncModelRunnerOutput):
        later = (
            output.get_output
        )  # which another thread calls; what the class calls its part of it depends on the runner
        output.get_output = lambda: _told(later(), unreadable)
        return output
    return _told(output, unreadable)


def _told(output: Any, unreadable: frozenset[int]) -> Any:
    if unreadable and isinstance(output, ModelRunnerOutput) and output.req_ids:
        setattr(output, FIELD, unreadable)
    return output


def fail(scheduler: Any, output: ModelRunnerOutput, unreadable: frozenset[int]) -> None:
    """Takes what a step made with unreadable adapters out of its output, and has their requests end with an error.

    Args:
        scheduler: vLLM's, which ends those that it holds in `encoder_cache_mismatch_reqs` that way.
        output: the step's, changed in place.
        unreadable: the adapters' numbers.
    """
    cache = scheduler.kv_cache_manager
    lost = any(name not in scheduler.requests for name in output.req_ids)
    for name, request in scheduler.requests.items():
        worn = request.lora_request
        if worn is None or worn.lora_int_id not in unreadable or request.is_finished():
            continue
        logger.error("Request %s fails: adapter %s could not be read, or worn.", name, worn.lora_name)
        cache.evict_blocks({block for group in cache.get_block_ids(name) for block in group})
        lost |= request.num_preemptions > 0
        row = output.req_id_to_index.get(name)
        if row is not None:
            if output.sampled_token_ids:
                output.sampled_token_ids[row] = []
            if output.pooler_output:
                output.pooler_output[row] = None
            output.prompt_logprobs_dict.pop(name, None)
            output.prompt_token_id_logprobs_dict.pop(name, None)
        scheduler.encoder_cache_mismatch_reqs.add(name)
    if lost:  # one has left the step, or was put off: which blocks it had is not known any more
        cache.evict_blocks(set(range(cache.block_pool.num_gpu_blocks)))


def _execute_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        """A worker's step; a pooling model's returns its output."""
        manager = getattr(getattr(self.worker, "model_runner", None), "lora_manager", None)
        if manager is not None:
            manager.ia3rt_is_told = True
        return tell(self.worker, original(self, scheduler_output))

    return execute_model


def _sample_tokens(self: Any, grammar_output: Any) -> Any:
    """The end of a worker's step."""
    return tell(self.worker, self.worker.sample_tokens(grammar_output))


def _update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        """What comes of a step."""
        unreadable = getattr(model_runner_output, FIELD, None)
        if unreadable:
            fail(self, model_runner_output, unreadable)
        return original(self, scheduler_output, model_runner_output)

    return update_from_output
