"""What reads adapters in vLLM's workers: an IA³ checkpoint or a mix of them, where the path says so, or else a LoRA."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.distributed import get_pp_group, get_tp_group
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from ia3rt.serving.vllm.composed_mixes import mixes_root, read_composed
from ia3rt.serving.vllm.model_manager import IA3Model, IA3ModelManager
from ia3rt.serving.vllm.requests import public_name
from ia3rt.serving.vllm.source import Source

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is under its own name


class IA3WorkerManager(LRUCacheWorkerLoRAManager):
    """LRUCacheWorkerLoRAManager for LoRAs and IA³ mixes.

    Attributes:
        ia3_counts: how many adapters and mixes were read, and the seconds that this took.
        ia3rt_unreadable: the numbers of the step's adapters that could not be read, LoRAs too, or put on (failing.py).
        ia3rt_is_told: whether the scheduler is told of them; some of vLLM's executors step another way.
        ia3rt_hands_on: whether a stage's next one is told of them (stages.py).
    """

    _manager_cls = IA3ModelManager
    _adapter_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ia3_counts: dict[str, float] = {"loads": 0, "load_seconds": 0.0}
        self.ia3rt_unreadable: set[int] = set()
        self.ia3rt_is_told = self.ia3rt_hands_on = False
        self._stand_ins: set[int] = set()

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        path, name = lora_request.lora_path, lora_request.lora_name
        source = Source.of(path, name) or Source.of(get_adapter_absolute_path(path), name)
        if source is None:
            return super()._load_adapter(lora_request)
        start = time.perf_counter()
        try:
            # The API server has composed a mix before; only one that was removed since is composed here.
            vectors = read_composed(path, mixes_root()) or source.vectors()
        except FileNotFoundError as error:
            raise LoRAAdapterNotFoundError(name, path) from error
        made = IA3Model(lora_request.lora_int_id, self._adapter_manager.ia3_layers.place(public_name(name), vectors))
        self.ia3_counts["loads"] += 1
        self.ia3_counts["load_seconds"] += time.perf_counter() - start
        return made

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Makes sure that an adapter is read and has a slot; called for each adapter of each step."""
        manager, number = self._adapter_manager, lora_request.lora_int_id
        if number in self._stand_ins:  # it may be there again
            manager.remove_adapter(number)
            self._stand_ins.remove(number)
        if lora_request.load_inplace or number not in manager._registered_adapters:
            added: bool = super().add_adapter(lora_request)
            return added
        # vLLM copies the list of all adapters to look one up: half a millisecond where there are a thousand.
        manager.get_adapter(number)  # which is used last from now on
        manager.activate_adapter(number)
        return True

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Gives a step's adapters their slots, and says which tokens wear them."""
        if mapping is None or mapping.type is LoRAMappingType.LANGUAGE:
            super().set_active_adapters(requests, mapping)
        else:  # a tower's, or a connector's: some of the step's, which have their slots
            self._adapter_manager.set_adapter_mapping(mapping)

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        """Gives each adapter of a step its slot; those that cannot be read get ones, and the step goes on.

        Raises:
            RuntimeError: there are more adapters than slots.
            Exception: one cannot be read, and nobody would be told.
        """
        # By number: one that was loaded again has another name than those have that run since before.
        by_number = {request.lora_int_id: request for request in lora_requests if request}
        requests = [by_number[number] for number in sorted(by_number)]
        if len(requests) > self._adapter_manager.lora_slots:
            raise RuntimeError(f"{len(requests)} adapters in one step, and {self._adapter_manager.lora_slots} slots")
        known = self._adapter_manager._registered_adapters
        new = [each for each in requests if each.lora_int_id not in known or self._is_to_be_read(each)]
        for request in requests:
            if request not in new:
                self.add_adapter(request)
        failed = [self._is_unreadable(request) for request in new]
        for request, is_so in zip(new, _anywhere(failed), strict=True):
            if is_so:
                self._stand_in(request.lora_int_id)
        self.ia3rt_unreadable = self._stand_ins & {request.lora_int_id for request in requests}
        self._adapter_manager.ia3_slots.unworn = self.ia3rt_unreadable  # to which layers add when they run

    def _is_to_be_read(self, request: LoRARequest) -> bool:
        return request.load_inplace or request.lora_int_id in self._stand_ins

    def _is_unreadable(self, request: LoRARequest) -> bool:
        try:
            self.add_adapter(request)
        except Exception as error:  # of any kind: vLLM's for a LoRA too
            stages = get_pp_group().world_size
            if not self.ia3rt_is_told or (stages > 1 and not self.ia3rt_hands_on):
                raise
            logger.error("Adapter %s could not be read: %s", request.lora_name, error)
            return True
        return False

    def _stand_in(self, number: int) -> None:
        """Puts ones where an adapter would be."""
        manager = self._adapter_manager
        manager.remove_adapter(number)
        if len(manager) + 1 > manager.capacity:
            manager.remove_oldest_adapter()
        manager.add_adapter(IA3Model(number, {}))
        manager.activate_adapter(number)
        self._stand_ins.add(number)


def _anywhere(failed: list[bool]) -> list[bool]:
    """For each adapter, whether any of the processes failed that share the layers; all of them read the same."""
    group = get_tp_group()
    if not failed or group.world_size == 1:
        return failed
    flags = torch.tensor(failed, dtype=torch.int32, device="cpu")
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return [bool(flag) for flag in flags]
