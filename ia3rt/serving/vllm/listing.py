"""What clients are told that adapters are called, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from ia3rt.serving.vllm.keeping import is_stored_path
from ia3rt.serving.vllm.requests import public_name
from ia3rt.serving.vllm.served import origins_of


def install() -> None:
    """Puts the functions of this file in front of vLLM's methods."""
    for name, made in (("show_available_models", _show_available_models), ("model_name", _model_name)):
        setattr(OpenAIServingModels, name, made(getattr(OpenAIServingModels, name)))


def _show_available_models(original: Callable[..., Any]) -> Callable[..., Any]:
    async def show_available_models(self: Any) -> Any:
        """GET /v1/models."""
        shown = await original(self)
        for card in shown.data:
            origins_of(self).show(card, is_stored_path(card.root or ""))
        return shown

    return show_available_models


def _model_name(original: Callable[..., Any]) -> Callable[..., Any]:
    def model_name(self: Any, lora_request: LoRARequest | None = None) -> str:
        """The name that an answer gives as its model."""
        return public_name(original(self, lora_request))

    return model_name
