"""What reads adapters in vLLM's workers: an IA³ checkpoint or a mix of them, where the path says so, or else a LoRA."""

from __future__ import annotations

import time
from typing import Any

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from ia3rt.serving.vllm.composed_mixes import mixes_root, read_composed
from ia3rt.serving.vllm.model_manager import IA3Model, IA3ModelManager
from ia3rt.serving.vllm.requests import public_name
from ia3rt.serving.vllm.source import Source


class IA3WorkerManager(LRUCacheWorkerLoRAManager):
    """LRUCacheWorkerLoRAManager for LoRAs and IA³ mixes.

    Attributes:
        ia3_counts: how many adapters and mixes were read, and the seconds that this took.
    """

    _manager_cls = IA3ModelManager
    _adapter_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ia3_counts: dict[str, float] = {"loads": 0, "load_seconds": 0.0}

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
        if lora_request.load_inplace or number not in manager._registered_adapters:
            added: bool = super().add_adapter(lora_request)
            return added
        # vLLM copies the list of all adapters to look one up: half a millisecond where there are a thousand.
        manager.get_adapter(number)  # which is used last from now on
        manager.activate_adapter(number)
        return True
