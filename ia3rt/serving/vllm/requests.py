"""The LoRARequests that stand for IA³ adapters and mixes.

vLLM tells adapters apart by number in its slots, by name in its sets and by name and path in its prefix cache. So here
all three follow from the content: what is the same shares a slot and cached keys and values; and what an adapter's name
meant before it was loaded again goes on under another name, for the requests that still run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from vllm import envs
from vllm.lora.request import LoRARequest

from ia3rt.mix import Mix
from ia3rt.serving.vllm.names import canonical, spelled
from ia3rt.serving.vllm.source import Source

_MARK = "@ia3:"


def store_root() -> Path:
    """The folder of stored adapters, which all workers have to see: VLLM_CACHE_ROOT's ia3rt/adapters."""
    return Path(envs.VLLM_CACHE_ROOT).expanduser() / "ia3rt" / "adapters"


def mix_request(mix: Mix, folders: Mapping[str, str | Path]) -> LoRARequest:
    """The request for a mix; equal mixes of the same numbers have equal requests, in every process.

    Args:
        mix: of names; their order does not matter.
        folders: each adapter's folder, as `store` returned it.
    """
    mix = canonical(mix)
    path = Source(mix, {name: str(folders[name]) for name in mix.adapters}).path()
    return _request(f"{spelled(mix)}{_MARK}{_digest(path)[:12]}", path)


def adapter_request(name: str, folder: Path, *, is_first: bool) -> LoRARequest:
    """The request for one adapter.

    Args:
        name: what users call it.
        folder: its folder, as `store` returned it.
        is_first: whether the name has meant nothing else so far: vLLM's metrics then show it as it is.
    """
    return _request(name if is_first else f"{name}{_MARK}{folder.name[:12]}", str(folder))


def public_name(name: str) -> str:
    """What users call the adapter or mix whose request has this name."""
    return name.rpartition(_MARK)[0] or name


def is_stored(request: LoRARequest) -> bool:
    """Whether a request is for one IA³ adapter that was stored here."""
    return Path(request.lora_path).parent == store_root()


def kind(request: LoRARequest) -> str | None:
    """What a request wears: "adapter", a mix's combination type, or None where it is a LoRA."""
    if is_stored(request):
        return "adapter"
    mix = Source.mix_of(request.lora_path)
    return None if mix is None else mix.combination_type


def _request(name: str, path: str) -> LoRARequest:
    number = int(_digest(f"{name}\n{path}")[:15], 16) + 1  # 60 bits: vLLM keeps it in an int64
    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
