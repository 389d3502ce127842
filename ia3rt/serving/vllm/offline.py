"""Adapters and mixes where there is no server: for vLLM's `LLM` and `AsyncLLM`, named as clients of a server do."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from vllm.lora.request import LoRARequest

from ia3rt.adapters.checkpoint import is_ia3
from ia3rt.adapters.folder import local_folder
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.mix_text import MixNameError, parse
from ia3rt.adapters.shortened import short
from ia3rt.serving.limits import check_files
from ia3rt.serving.vllm.hints import hint
from ia3rt.serving.vllm.keeping import is_stored_path, keeping
from ia3rt.serving.vllm.requests import Requests
from ia3rt.serving.vllm.source import Source
from ia3rt.serving.vllm.store import signature


def named_request(model: str, adapters: Mapping[str, str | Path]) -> LoRARequest:
    """See `ia3rt.serving.vllm.lora_request`."""
    if not isinstance(model, str):
        raise TypeError(f"lora_request takes the name of an adapter or of a mix, not {short(model)}")
    mix = parse(model) or Mix((model,))
    folders = {name: _folder(name, model, adapters, alone=mix == Mix((model,))) for name in mix.adapters}
    holds = "".join(_files(Path(folder)) for folder in folders.values() if not is_stored_path(folder))
    return _requests().mix(Source(mix, folders), holds)


@functools.cache
def _requests() -> Requests:
    """This process's: all are numbered and named as mixes are, beyond what users number and name themselves."""
    return Requests(lambda: 0)


def _files(folder: Path) -> str:
    """What changes when a LoRA's files do."""
    return str(signature(folder, sorted(file.name for file in folder.glob("adapter_*"))))


def _folder(name: str, model: str, adapters: Mapping[str, str | Path], *, alone: bool) -> str:
    if name not in adapters:
        known = short(", ".join(sorted(adapters)))
        raise ValueError(
            f"{short(model, 40)!r} needs adapter {short(name, 40)!r}, which is none of those given: {known}."
            + hint(model, name, adapters)
        )
    folder = local_folder(adapters[name])
    check_files(folder)
    if is_ia3(folder):
        return str(keeping().store(str(folder), name))
    if not alone:
        raise MixNameError(f"{short(model, 40)!r} has adapter {short(name, 40)!r}, which is a LoRA: only IA³ mixes")
    return str(folder.absolute())
