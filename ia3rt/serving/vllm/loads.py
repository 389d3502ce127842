"""How adapters come to a server and go: --lora-modules, /v1/load_lora_adapter and its like, and vLLM's resolvers.

Each function stands for a method of vLLM's, which `install` puts it in front of; what concerns no IA³ adapter goes on
to that method.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from ia3rt.adapters.checkpoint import is_ia3
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.shortened import short
from ia3rt.serving.access import folder_of
from ia3rt.serving.limits import check_files
from ia3rt.serving.settings import allowed_folder
from ia3rt.serving.vllm import metrics
from ia3rt.serving.vllm.admission import resolving
from ia3rt.serving.vllm.keeping import keeping
from ia3rt.serving.vllm.loading import apart
from ia3rt.serving.vllm.names import check_loaded_name
from ia3rt.serving.vllm.origins import log_refusal, resolved
from ia3rt.serving.vllm.refusals import echoing_little, refusal
from ia3rt.serving.vllm.served import admission_of, copies_of, origins_of, requests_of
from ia3rt.serving.vllm.source import Source
from ia3rt.serving.vllm.store import discard


def install() -> None:
    """Puts the functions of this file in front of vLLM's methods."""
    for name, made in (
        ("init_static_loras", _init_static_loras),
        ("load_lora_adapter", _load_lora_adapter),
        ("load_lora_adapter", _logged),
        ("unload_lora_adapter", _unload_lora_adapter),
        ("resolve_lora", _resolve_lora),
    ):
        setattr(OpenAIServingModels, name, made(getattr(OpenAIServingModels, name)))


def _init_static_loras(original: Callable[..., Any]) -> Callable[..., Any]:
    async def init_static_loras(self: Any) -> None:
        """--lora-modules: one that cannot be loaded ends the server with a sentence, and no traceback."""
        try:
            await original(self)
        except ValueError as error:
            print(f"Error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error

    return init_static_loras


def _load_lora_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        """POST /v1/load_lora_adapter and --lora-modules."""
        if not request.lora_path:
            return echoing_little(await original(self, request, base_model_name), request)
        try:
            _check_meaning(request)
        except ValueError as error:
            return create_error_response(str(error), "BadRequestError", HTTPStatus.BAD_REQUEST)
        try:
            folder, ours = await apart(_look, request.lora_path, _allowed(self, request))
        except (OSError, ValueError) as error:
            metrics.REFUSED.inc()
            return echoing_little(refusal(error, request.lora_name), request)
        if not ours:
            return echoing_little(await _load_lora(original, self, request, base_model_name), request)
        name = request.lora_name
        async with self.lora_resolver_lock[name]:
            refused = await self._check_load_lora_adapter_request(request)
            if refused is not None:
                return echoing_little(refused, request)
            stored: Path | None = None
            start = time.perf_counter()
            try:
                stored = await apart(keeping().store, str(folder), name)
                vectors = await admission_of(self).check_adapter(Source(Mix((name,)), {name: str(stored)}))
                made = requests_of(self).adapter(name, stored)
                if base_model_name is not None and self.is_base_model(base_model_name):
                    made.base_model_name = base_model_name
                await self.engine_client.add_lora(made)
            except Exception as error:  # of any kind: the worker's come as vLLM wraps them
                metrics.REFUSED.inc()
                if stored is not None:
                    await apart(_forget, self, stored)
                return echoing_little(refusal(error, name), request)
            self.lora_requests[name] = made
            origins_of(self).loaded(name, request.lora_path, stored, vectors, time.perf_counter() - start)
        keeping().hold_only(copies_of(self))
        metrics.watch(self.engine_client)
        return f"Success: LoRA adapter '{name}' added successfully."

    return load_lora_adapter


async def _load_lora(original: Callable[..., Any], models: Any, request: Any, base_model_name: str | None) -> Any:
    """Loads a LoRA as another one than whatever had its name: that may run, and vLLM would load over it.

    vLLM is told a name that nobody else has, and by that also gives a number that nobody has.
    """
    if not request.lora_name or not request.lora_path:
        return await original(models, request, base_model_name)
    name = request.lora_name
    async with models.lora_resolver_lock[name]:
        refused = await models._check_load_lora_adapter_request(request)
        if refused is not None:
            return refused
        alias = f"{name}#{secrets.token_hex(16)}"  # which nobody can have loaded, or load meanwhile
        loading = request.model_copy(update={"lora_name": alias, "load_inplace": False})
        loaded = await original(models, loading, base_model_name)
        if alias not in models.lora_requests:
            says = loaded.error.message.replace(alias, name)
            if loaded.error.code == HTTPStatus.INTERNAL_SERVER_ERROR and not models.engine_client.errored:
                return refusal(ValueError(says), name)  # the adapter's fault: a worker could not read it, or fit it
            loaded.error.message = says
            return loaded
        made = models.lora_requests.pop(alias)
        made.lora_name = requests_of(models).claimed(name)
        models.lora_requests[name] = made
    return f"Success: LoRA adapter '{name}' added successfully."


def _check_meaning(request: Any) -> None:
    """Raises ValueError where a name or a path to load has a meaning of its own here."""
    check_loaded_name(request.lora_name or "")
    path = request.lora_path or ""
    if Source.is_mix(path):
        raise ValueError(f"`{short(path)}` is no folder: a mix is no adapter that can be loaded, name it as a model.")


def _allowed(models: Any, request: Any) -> Path | None:
    """The folder that a request may load from; None for any. What the operator named at the start is from anywhere."""
    static = models.static_lora_modules or ()
    if any((each.name, each.path) == (request.lora_name, request.lora_path) for each in static):
        return None
    return allowed_folder()


def _look(path: str, allowed: Path | None) -> tuple[Path, bool]:
    """The folder that a client's path means, and whether it holds an IA³ adapter; see access.folder_of."""
    if envs.VLLM_USE_MODELSCOPE and allowed is None:
        path = get_adapter_absolute_path(path)
    folder = folder_of(path, allowed)
    check_files(folder)
    return folder, is_ia3(folder)


def _forget(models: Any, folder: Path) -> None:
    """Removes the copy of an adapter that the workers refused, where it is nobody's."""
    keeping().hold_only(copies_of(models))
    discard(folder)


def _logged(original: Callable[..., Any]) -> Callable[..., Any]:
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        """Says in the log what was refused."""
        answer = await original(self, request, base_model_name)
        if hasattr(answer, "error"):
            log_refusal(request.lora_name, request.lora_path, answer)
        return answer

    return load_lora_adapter


def _unload_lora_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        """POST /v1/unload_lora_adapter."""
        answer = echoing_little(await original(self, request), request)
        if request.lora_name not in self.lora_requests:
            origins_of(self).unloaded(request.lora_name)
        return answer

    return unload_lora_adapter


def _resolve_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        """The adapter that vLLM's resolvers found under a name, or what it answers where they found none."""
        token = resolving.set(admission_of(self))
        try:
            with self.lora_id_counter.lent() as numbers:
                found = await original(self, lora_name)
        finally:
            resolving.reset(token)
        if isinstance(found, LoRARequest):
            if numbers:  # or it was loaded before
                found.lora_name = requests_of(self).claimed(lora_name)
                where = resolved.get()
                if where is not None and str(where[1]) == found.lora_path:
                    origins_of(self).loaded(lora_name, *where)
        elif found.error.code == HTTPStatus.NOT_FOUND:
            self.lora_id_counter.give_back(numbers)
        return found

    return resolve_lora
