"""What this plugin knows of a server, beside what vLLM's OpenAIServingModels does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from ia3rt.serving.max_scale import max_scale
from ia3rt.serving.vllm.adapter_numbers import AdapterNumbers
from ia3rt.serving.vllm.admission import Admission
from ia3rt.serving.vllm.composed_mixes import ComposedMixes, mixes_root
from ia3rt.serving.vllm.name_locks import NameLocks
from ia3rt.serving.vllm.origins import Origins
from ia3rt.serving.vllm.requests import Requests, is_stored


def install() -> None:
    """Puts the function of this file in front of vLLM's method."""
    OpenAIServingModels.__init__ = _init(OpenAIServingModels.__init__)


def requests_of(models: Any) -> Requests:
    """The requests of this server's OpenAIServingModels."""
    known: Requests = models.ia3rt_requests
    return known


def admission_of(models: Any) -> Admission:
    """What this server's OpenAIServingModels lets go to the engine."""
    admission: Admission = models.ia3rt_admission
    return admission


def origins_of(models: Any) -> Origins:
    """Where the adapters of this server's OpenAIServingModels come from."""
    origins: Origins = models.ia3rt_origins
    return origins


def copies_of(models: Any) -> set[Path]:
    """The stored copies of all IA³ adapters that are loaded."""
    return {Path(request.lora_path) for request in models.lora_requests.values() if is_stored(request)}


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        """What vLLM counts and locks by, and what this plugin knows of a server."""
        original(self, *args, **kwargs)
        self.lora_id_counter = AdapterNumbers()
        self.lora_resolver_lock = NameLocks()
        config = self.engine_client.vllm_config
        rank, count = config.parallel_config._api_process_rank, config.parallel_config._api_process_count
        self.ia3rt_requests = Requests(lambda: self.lora_id_counter.inc(1), rank, count)
        limit = max_scale(str(self.model_config.dtype).removeprefix("torch."))
        self.ia3rt_origins = Origins()
        self.ia3rt_admission = Admission(limit, ComposedMixes(mixes_root()))

    return init
