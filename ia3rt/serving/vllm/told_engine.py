"""What an engine is told to wear, by whomever: it is looked at before, and one that cannot be worn is an exception.

vLLM reads an adapter in a step, and what is raised there ends the engine, or the request with an empty answer. So the
first request that wears an adapter has it read here, against the limit on scales, and then loaded outside of a step,
where a worker that refuses it says so. That serves vLLM's `LLM` and `AsyncLLM`; its server's requests were looked at by
requested.py, which tells it here.
"""

from __future__ import annotations

import asyncio
import functools
from collections import OrderedDict
from collections.abc import Callable
from itertools import count as counting
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace
from vllm.exceptions import VLLMClientError, VLLMNotFoundError
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from ia3rt.adapters.folder import CONFIG_NAME
from ia3rt.adapters.mix_text import MixNameError
from ia3rt.serving.access import shown
from ia3rt.serving.max_scale import max_scale
from ia3rt.serving.vllm.adapter_numbers import END
from ia3rt.serving.vllm.name_locks import NameLocks
from ia3rt.serving.vllm.requests import public_name
from ia3rt.serving.vllm.scale_check import checked_vectors
from ia3rt.serving.vllm.sentences import sentence_of
from ia3rt.serving.vllm.source import Source

MOST = 20_000
"""Adapters and mixes that are known to have been looked at. One that was forgotten is loaded again, which is nothing
where it still is."""


class UnwearableError(VLLMClientError, ValueError):
    """What cannot be worn. AsyncLLM hides what is no VLLMClientError behind an error without a word."""


class AdapterNotThereError(VLLMNotFoundError, FileNotFoundError):
    """There is no adapter at a request's path."""


class _Taken(NamedTuple):
    """What an engine took: a request's name and path as they were then, as the server renames some."""

    name: str
    path: str
    is_ia3: bool


class Told:
    """What one engine was told to wear, by number."""

    def __init__(self) -> None:
        self.locks = NameLocks()
        self._taken: OrderedDict[int, _Taken] = OrderedDict()
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._serials = counting(END)  # beyond all numbers
        self._again: dict[int, int] = {}

    def apart(self, request: LoRARequest) -> LoRARequest:
        """The request for the engine, which holds what was loaded last and need not load it in each step.

        It has another name where its own is that of another number, or its number was loaded again. vLLM numbers
        adapters, but makes sets of them by name: of two with one name, a step would get one its slot. And by name and
        path its prefix cache knows what keys and values were made with.
        """
        name, number = request.lora_name, request.lora_int_id
        if number in self._again:
            name = f"{name}#{self._again[number]}"
        while self._numbers.get(name, number) != number:
            name = f"{name}#{number}"
        if name in self._numbers:
            self._numbers.move_to_end(name)
        if (name, False) == (request.lora_name, request.load_inplace):
            return request
        return replace(request, lora_name=name, load_inplace=False)

    def knows(self, request: LoRARequest) -> bool:
        """Whether the engine has taken this, and need not read it again."""
        taken = self._taken.get(request.lora_int_id)
        if taken is None or taken.path != request.lora_path or request.load_inplace:
            return False
        self._taken.move_to_end(request.lora_int_id)
        return True

    def check_number(self, request: LoRARequest, *, is_ia3: bool) -> None:
        """Raises ValueError where the number is another's, which the engine would go on to wear.

        Of two LoRAs vLLM says nothing, and nor does this.
        """
        taken = self._taken.get(request.lora_int_id)
        if taken is None or taken.path == request.lora_path or request.load_inplace:
            return
        if is_ia3 or taken.is_ia3:
            raise ValueError(
                f"lora_int_id {request.lora_int_id} is that of adapter {shown(taken.name)}, and cannot be that of "
                f"{shown(request.lora_name)} too: give each adapter a number of its own"
            )

    def add(self, request: LoRARequest, *, is_ia3: bool) -> None:
        """Remembers what the engine has taken."""
        number = request.lora_int_id
        if request.load_inplace:
            self._again[number] = next(self._serials)
        name = self.apart(request).lora_name
        self._numbers[name] = number
        self._taken[number] = _Taken(name, request.lora_path, is_ia3)
        self._taken.move_to_end(number)
        for known in (self._taken, self._numbers):
            if len(known) > MOST:
                known.popitem(last=False)

    def removed(self, number: int) -> None:
        """Remembers that the engine has a number no more, which may be loaded again."""
        if self._taken.pop(number, None) is not None:
            self._again[number] = next(self._serials)


def told(engine: Any) -> Told:
    """What an engine of vLLM's, LLMEngine or AsyncLLM, was told."""
    known: Told = vars(engine).setdefault("ia3rt_told", Told())
    return known


def install() -> None:
    """Puts the functions of this file in front of vLLM's methods."""
    for owner, name, made in (
        (LLMEngine, "add_lora", _add_lora),
        (LLMEngine, "remove_lora", _remove_lora),
        (LLMEngine, "add_request", _add_request),
        (AsyncLLM, "add_lora", _add_lora_async),
        (AsyncLLM, "remove_lora", _remove_lora_async),
        (AsyncLLM, "add_request", _add_request_async),
    ):
        setattr(owner, name, made(getattr(owner, name)))


def check(request: LoRARequest, dtype: str) -> bool:
    """Reads what a request is to wear, and returns whether it is IA³. A LoRA is left to vLLM.

    Args:
        request: with the path of an adapter's folder, or of a mix.
        dtype: the model's, such as "bfloat16".

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is damaged, of another kind, or a scale is beyond the limit.
    """
    path, name = request.lora_path, public_name(request.lora_name)
    source = Source.of(path, name)
    if source is None and "://" not in path:
        try:
            path = get_adapter_absolute_path(path)
        except OSError as error:  # the Hub's, which does not name the adapter
            says = f"adapter {shown(name)} is not there: {shown(path)} is no folder here, and the Hub did not give it"
            raise FileNotFoundError(says) from error
        source = Source.of(path, name)
        if source is None and not (Path(path) / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"adapter {shown(name)} is not there: {shown(path)} has no {CONFIG_NAME}")
    if source is None:
        return False
    checked_vectors(source.bank(), source.mix, max_scale(dtype))
    return True


def _refused(error: Exception, request: LoRARequest) -> VLLMClientError:
    """What was refused, here or by a worker, as one sentence."""
    name, says = public_name(request.lora_name), sentence_of(error)
    if not isinstance(error, MixNameError) and repr(name) not in says:  # which names all that it is about
        says = f"adapter {shown(name)} cannot be loaded: {says}"
    return AdapterNotThereError(says) if isinstance(error, FileNotFoundError) else UnwearableError(says)


def _dtype(engine: Any) -> str:
    return str(engine.vllm_config.model_config.dtype).removeprefix("torch.")


def _new(engine: Any, prompt: Any, request: LoRARequest | None) -> LoRARequest | None:
    """What a request is to wear that has to be looked at; vLLM's own check speaks where adapters are not enabled."""
    worn = request or getattr(prompt, "lora_request", None)  # a prompt may be vLLM's request
    is_new = worn is not None and engine.vllm_config.lora_config is not None and not told(engine).knows(worn)
    return worn if is_new else None


def _add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_lora(self: Any, lora_request: LoRARequest) -> bool:
        """Loads an adapter.

        Raises:
            AdapterNotThereError: there is none.
            UnwearableError: it is damaged, does not fit the model, has a scale beyond the limit, or another's number.
        """
        try:
            is_ia3 = check(lora_request, _dtype(self))
            told(self).check_number(lora_request, is_ia3=is_ia3)
            added: bool = original(self, lora_request)
        except EngineDeadError:
            raise
        except Exception as error:  # of any kind, from vLLM's workers
            raise _refused(error, lora_request) from error
        told(self).add(lora_request, is_ia3=is_ia3)
        return added

    return add_lora


def _add_lora_async(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_lora(self: Any, lora_request: LoRARequest) -> bool:
        """As `_add_lora`."""
        try:
            is_ia3 = await asyncio.to_thread(check, lora_request, _dtype(self))
            told(self).check_number(lora_request, is_ia3=is_ia3)
            added: bool = await original(self, lora_request)
        except EngineDeadError:
            raise
        except Exception as error:
            raise _refused(error, lora_request) from error
        told(self).add(lora_request, is_ia3=is_ia3)
        return added

    return add_lora


def _remove_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def remove_lora(self: Any, lora_id: int) -> bool:
        """Removes an adapter, whose number may be another's then."""
        told(self).removed(lora_id)
        removed: bool = original(self, lora_id)
        return removed

    return remove_lora


def _remove_lora_async(original: Callable[..., Any]) -> Callable[..., Any]:
    async def remove_lora(self: Any, lora_id: int) -> bool:
        """As `_remove_lora`."""
        told(self).removed(lora_id)
        removed: bool = await original(self, lora_id)
        return removed

    return remove_lora


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_request(
        self: Any,
        request_id: str,
        prompt: Any,
        params: Any,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        """Tells the engine of a request, and before of an adapter that it does not know; see `_add_lora`."""
        new = _new(self, prompt, lora_request)
        if new is not None:
            self.add_lora(new)
        lora_request = lora_request and told(self).apart(lora_request)
        added: str = original(self, request_id, prompt, params, arrival_time, lora_request, *args, **kwargs)
        return added

    return add_request


def _add_request_async(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def add_request(
        self: Any,
        request_id: str,
        prompt: Any,
        params: Any,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `_add_request`."""
        new = _new(self, prompt, lora_request)
        if new is not None:
            async with told(self).locks[str(new.lora_int_id)]:
                if not told(self).knows(new):  # another request may have loaded it meanwhile
                    await self.add_lora(new)
        lora_request = lora_request and told(self).apart(lora_request)
        return await original(self, request_id, prompt, params, arrival_time, lora_request, *args, **kwargs)

    return add_request
