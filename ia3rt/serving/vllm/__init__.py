"""IA³ in vLLM: its plugin, which serves IA³ adapters and mixes of them wherever vLLM takes a LoRA.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes.
"""

from __future__ import annotations


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
