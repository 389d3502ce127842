"""IA³ in vLLM: its plugin, which serves IA³ adapters and mixes of them wherever vLLM takes a LoRA.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes.
"""

from __future__ import annotations


def register() -> None:
    """Teaches vLLM to serve IA³ adapters. Calling it again changes nothing.

    Raises:
        ChangedVLLMError: the installed vLLM lacks something that this needs; nothing is changed then.
    """
    from ia3rt.serving.vllm.symbols import check_symbols

    check_symbols()
    from ia3rt.serving.vllm.registration import register_once

    register_once()
