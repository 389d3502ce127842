"""What vLLM's resolvers, which load an adapter for whoever names it, do about IA³ adapters, and about odd names."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

from ia3rt.adapters.checkpoint import is_ia3, read_config
from ia3rt.adapters.folder import CONFIG_NAME
from ia3rt.adapters.mix import Mix
from ia3rt.serving.access import is_name_within, shown
from ia3rt.serving.limits import check_files
from ia3rt.serving.vllm.admission import resolving
from ia3rt.serving.vllm.keeping import keeping
from ia3rt.serving.vllm.loading import apart
from ia3rt.serving.vllm.origins import resolved
from ia3rt.serving.vllm.source import Source

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is under its own name


def install() -> None:
    """Puts the functions of this file in front of vLLM's methods."""
    for name, made in (("resolve_lora", _resolve_lora), ("_get_lora_req_from_path", _get_lora_req_from_path)):
        setattr(FilesystemResolver, name, made(getattr(FilesystemResolver, name)))


def _resolve_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def resolve_lora(self: Any, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Finds nothing under a name that leads out of the resolver's folder, or is written in another way."""
        if not await apart(is_name_within, Path(self.lora_cache_dir), lora_name):
            logger.warning("No adapter was looked for under %s: it is no name of a folder here.", shown(lora_name))
            return None
        found: LoRARequest | None = await original(self, base_model_name, lora_name)
        return found

    return resolve_lora


def _get_lora_req_from_path(original: Callable[..., Any]) -> Callable[..., Any]:
    async def get_lora_req_from_path(
        self: Any, lora_name: str, lora_path: str, base_model_name: str
    ) -> LoRARequest | None:
        """What vLLM's resolvers, of a folder or the Hub, found under a name."""
        trained_on = await apart(_ia3_of, Path(lora_path))
        if trained_on is None:
            found: LoRARequest | None = await original(self, lora_name, lora_path, base_model_name)
            return found
        if trained_on != base_model_name:  # as vLLM has it for LoRAs
            logger.warning(
                "Adapter %s was trained on %s, and not on %s: it is not resolved.",
                shown(lora_name),
                shown(trained_on),
                base_model_name,
            )
            return None
        start = time.perf_counter()
        folder = await apart(keeping().store, lora_path, lora_name)
        admission = resolving.get()
        if admission is not None:
            vectors = await admission.check_adapter(Source(Mix((lora_name,)), {lora_name: str(folder)}))
            resolved.set((lora_path, folder, vectors, time.perf_counter() - start))
        return LoRARequest(lora_name, 1, str(folder))  # vLLM numbers it

    return get_lora_req_from_path


def _ia3_of(folder: Path) -> str | None:
    """The base model that an IA³ adapter was trained on, or None where a folder holds none.

    Raises:
        ValueError: a file of it is none, or the config is damaged.
    """
    check_files(folder)
    if not is_ia3(folder):
        return None
    config = read_config(folder / CONFIG_NAME)
    return str(config.get("base_model_name_or_path", config.get("model_name")))
