"""IA³ in vLLM: its plugin, which serves IA³ adapters and mixes of them wherever vLLM takes a LoRA.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. `lora_request` is
for who uses vLLM's engine in Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


def register() -> None:
    """Teaches vLLM to serve IA³ adapters. Calling it again changes nothing.

    Raises:
        ChangedVLLMError: the installed vLLM lacks something that this needs; nothing is changed then.
        ValueError: a variable of the environment (settings.py) says nothing that this knows.
    """
    from ia3rt.serving.settings import check_settings
    from ia3rt.serving.vllm.symbols import check_symbols

    check_settings()
    check_symbols()
    from ia3rt.serving.vllm.registration import register_once

    register_once()


def lora_request(model: str, adapters: Mapping[str, str | Path]) -> LoRARequest:
    """The `lora_request=` of vLLM's `LLM` and `AsyncLLM` for an adapter or a mix, named as in a request to a server.

    The vectors are copied into the store, so a folder may change afterwards; call this again for what it holds then.
    Equal mixes of the same numbers are one request, and no number or name is one that users give their own.

    Args:
        model: an adapter's name, or a mix: `a*b`, `mix:a*0.7+b*0.3`, `delta:a*0.5`.
        adapters: where the adapters are, by name: folders, or ids on the Hugging Face Hub. A LoRA is not mixed.

    Raises:
        FileNotFoundError: an adapter is not there.
        ValueError: `model` means no mix or names no adapter of these, or one is damaged or of another kind. Scales
            beyond the limit, which is the model's, are a ValueError of the engine's method that is given the request.
    """
    from ia3rt.serving.vllm.offline import named_request

    return named_request(model, adapters)
