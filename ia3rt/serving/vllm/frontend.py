"""What vLLM's OpenAI server does about IA³ adapters and mixes: loading, listing, and finding what a request means.

Each function stands for a method of vLLM's, which `install` puts it in front of; what concerns no IA³ adapter goes on
to that method.

Mixes do not come from a LoRAResolver: vLLM asks those only where adapters may be loaded at runtime, and keeps what they
find as a loaded adapter, which would go on with an adapter's old numbers after that was loaded again.
"""

from __future__ import annotations

import functools
import secrets
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm import envs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling.handlers import validation
from vllm.entrypoints.serve.exception_handling.utils import sanitize_message
from vllm.entrypoints.speech_to_text.realtime.connection import RealtimeConnection
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from ia3rt.adapters.checkpoint import is_ia3
from ia3rt.adapters.mix import Mix
from ia3rt.serving.access import folder_of
from ia3rt.serving.limits import check_files
from ia3rt.serving.max_scale import max_scale
from ia3rt.serving.settings import allowed_folder, is_key_for_all
from ia3rt.serving.vllm import bodies, doors, metrics, resolvers
from ia3rt.serving.vllm.adapter_numbers import AdapterNumbers
from ia3rt.serving.vllm.admission import Admission, resolving
from ia3rt.serving.vllm.composed_mixes import ComposedMixes, mixes_root
from ia3rt.serving.vllm.hints import hint
from ia3rt.serving.vllm.keeping import is_stored_path, keeping
from ia3rt.serving.vllm.loading import apart
from ia3rt.serving.vllm.merged_adapters import FIELD, read_merged_adapters
from ia3rt.serving.vllm.name_locks import NameLocks
from ia3rt.serving.vllm.names import ECHO, MixNameError, canonical, check_loaded_name, parse, short, spelled
from ia3rt.serving.vllm.origins import Origins, log_refusal, resolved
from ia3rt.serving.vllm.refusals import named, refusal, unwrapped
from ia3rt.serving.vllm.requests import Requests, is_stored, public_name
from ia3rt.serving.vllm.source import Source
from ia3rt.serving.vllm.store import discard
from ia3rt.serving.vllm.told_engine import told


class UnknownAdapterError(VLLMNotFoundError):
    """A mix of an adapter that is not loaded, or not any more."""


def install() -> None:
    """Puts the functions of this file in front of vLLM's methods."""
    for owner, name, made in (
        (OpenAIServingModels, "__init__", _init),
        (OpenAIServingModels, "init_static_loras", _init_static_loras),
        (OpenAIServingModels, "load_lora_adapter", _load_lora_adapter),
        (OpenAIServingModels, "load_lora_adapter", _logged),
        (OpenAIServingModels, "unload_lora_adapter", _unload_lora_adapter),
        (OpenAIServingModels, "resolve_lora", _resolve_lora),
        (OpenAIServingModels, "show_available_models", _show_available_models),
        (OpenAIServingModels, "model_name", _model_name),
        (BaseServing, "_check_model", _check_model),
        (BaseServing, "_maybe_get_adapters", _maybe_get_adapters),
        (PoolingBaseServing, "_check_model", _check_pooling_model),
        (RealtimeConnection, "_check_model", _check_realtime_model),
    ):
        setattr(owner, name, made(getattr(owner, name)))
    validation._MAX_ERROR_INPUT_CHARS = ECHO  # of a name that is no text
    bodies.install()
    resolvers.install()
    if is_key_for_all():
        doors.install()


def requested_source(models: Any, name: str | None) -> Source | None:
    """The mix that `name` means, of the adapters as they are loaded now, or None where it means something else.

    Args:
        models: vLLM's OpenAIServingModels, which knows the loaded adapters.
        name: a request's `model`.

    Raises:
        MixNameError: it begins as a mix and goes on as none, or an adapter in it is a LoRA.
        UnknownAdapterError: an adapter in it is not loaded.
    """
    mix = _named_mix(models, name)
    if mix is None:
        return None
    told, loaded = short(name, 40), models.lora_requests
    for adapter in mix.adapters:
        if adapter not in loaded:
            raise UnknownAdapterError(
                f"The mix `{told}` needs adapter `{short(adapter, 40)}`, which is not loaded."
                + hint(name or "", adapter, loaded)
            )
        if not is_stored(loaded[adapter]):
            raise MixNameError(
                f"The mix `{told}` has adapter `{short(adapter, 40)}`, which is a LoRA: only IA³ adapters mix."
            )
    mix = canonical(mix)
    return Source(mix, {adapter: loaded[adapter].lora_path for adapter in mix.adapters})


async def _resolve(models: Any, name: str | None) -> None:
    """Lets vLLM's resolvers load a mix's adapters, where they may load the one adapter that a request names."""
    # A server that only renders prompts has no resolvers, nor any adapter.
    if not (getattr(models, "lora_resolvers", None) and envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING):
        return
    mix = _named_mix(models, name)
    for adapter in () if mix is None else mix.adapters:
        if adapter not in models.lora_requests:
            await models.resolve_lora(adapter)


def _named_mix(models: Any, name: str | None) -> Mix | None:
    if not name or name in models.lora_requests or models.is_base_model(name):
        return None
    return parse(name)


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


def _init_static_loras(original: Callable[..., Any]) -> Callable[..., Any]:
    async def init_static_loras(self: Any) -> None:
        """--lora-modules: one that cannot be loaded ends the server with a sentence, and no traceback."""
        try:
            await original(self)
        except ValueError as error:
            print(f"Error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error

    return init_static_loras


def _logged(original: Callable[..., Any]) -> Callable[..., Any]:
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        """Says in the log what was refused."""
        answer = await original(self, request, base_model_name)
        if hasattr(answer, "error"):
            log_refusal(request.lora_name, request.lora_path, answer)
        return answer

    return load_lora_adapter


def _load_lora_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        """POST /v1/load_lora_adapter and --lora-modules."""
        if not request.lora_path:
            return _echoing_little(await original(self, request, base_model_name), request)
        try:
            _check_meaning(request)
        except ValueError as error:
            return create_error_response(str(error), "BadRequestError", HTTPStatus.BAD_REQUEST)
        try:
            folder, ours = await apart(_look, request.lora_path, _allowed(self, request))
        except (OSError, ValueError) as error:
            metrics.REFUSED.inc()
            return _echoing_little(refusal(error, request.lora_name), request)
        if not ours:
            return _echoing_little(await _load_lora(original, self, request, base_model_name), request)
        name = request.lora_name
        async with self.lora_resolver_lock[name]:
            refused = await self._check_load_lora_adapter_request(request)
            if refused is not None:
                return _echoing_little(refused, request)
            stored: Path | None = None
            start = time.perf_counter()
            try:
                stored = await apart(keeping().store, str(folder), name)
                vectors = await _admission(self).check_adapter(Source(Mix((name,)), {name: str(stored)}))
                made = _requests(self).adapter(name, stored)
                if base_model_name is not None and self.is_base_model(base_model_name):
                    made.base_model_name = base_model_name
                await self.engine_client.add_lora(made)
            except Exception as error:  # of any kind: the worker's come as vLLM wraps them
                metrics.REFUSED.inc()
                if stored is not None:
                    await apart(_forget, self, stored)
                return _echoing_little(refusal(error, name), request)
            self.lora_requests[name] = made
            self.ia3rt_origins.loaded(name, request.lora_path, stored, vectors, time.perf_counter() - start)
        keeping().hold_only(_stored(self))
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
            loaded.error.message = named(name, unwrapped(loaded.error.message.replace(alias, name)))
            return loaded
        made = models.lora_requests.pop(alias)
        made.lora_name = _requests(models).claimed(name)
        models.lora_requests[name] = made
    return f"Success: LoRA adapter '{name}' added successfully."


def _check_meaning(request: Any) -> None:
    """Raises ValueError where a name or a path to load has a meaning of its own here."""
    check_loaded_name(request.lora_name or "")
    path = request.lora_path or ""
    if Source.is_mix(path):
        raise ValueError(f"`{short(path)}` is no folder: a mix is no adapter that can be loaded, name it as a model.")


def _unload_lora_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        """POST /v1/unload_lora_adapter."""
        answer = _echoing_little(await original(self, request), request)
        if request.lora_name not in self.lora_requests:
            self.ia3rt_origins.unloaded(request.lora_name)
        return answer

    return unload_lora_adapter


def _resolve_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        """The adapter that vLLM's resolvers found under a name, or what it answers where they found none."""
        token = resolving.set(_admission(self))
        try:
            with self.lora_id_counter.lent() as numbers:
                found = await original(self, lora_name)
        finally:
            resolving.reset(token)
        if isinstance(found, LoRARequest):
            if numbers:  # or it was loaded before
                found.lora_name = _requests(self).claimed(lora_name)
                where = resolved.get()
                if where is not None and str(where[1]) == found.lora_path:
                    self.ia3rt_origins.loaded(lora_name, *where)
        elif found.error.code == HTTPStatus.NOT_FOUND:
            self.lora_id_counter.give_back(numbers)
        return found

    return resolve_lora


def _show_available_models(original: Callable[..., Any]) -> Callable[..., Any]:
    async def show_available_models(self: Any) -> Any:
        """GET /v1/models."""
        shown = await original(self)
        for card in shown.data:
            self.ia3rt_origins.show(card, is_stored_path(card.root or ""))
        return shown

    return show_available_models


def _model_name(original: Callable[..., Any]) -> Callable[..., Any]:
    def model_name(self: Any, lora_request: LoRARequest | None = None) -> str:
        """The name that an answer gives as its model."""
        return public_name(original(self, lora_request))

    return model_name


def _check_model(original: Callable[..., Any]) -> Callable[..., Any]:
    async def check_model(self: Any, request: Any) -> Any:
        """None where what the request names is served, or an error; a body's mix becomes the name of its model."""
        try:
            _take_mix(self, request)
            await _resolve(self.models, request.model)
            refused: Any = None
            source = requested_source(self.models, request.model)
            if source is None:
                refused = _echoing_little(await original(self, request), request)
            if getattr(refused, "error", None) is None:
                await _look_after(self.models, request.model)
            elif refused.error.code == HTTPStatus.NOT_FOUND:
                known = chain((base.name for base in self.models.base_model_paths), self.models.lora_requests)
                told = hint(request.model, request.model, known)
                refused.error.message = refused.error.message.rstrip(".") + "." + told
            if source is not None:
                await _admission(self.models).admit(source)
        except UnknownAdapterError as error:
            return self.create_error_response(str(error), "NotFoundError", HTTPStatus.NOT_FOUND, "model")
        except MixNameError as error:
            return self.create_error_response(str(error), "BadRequestError", HTTPStatus.BAD_REQUEST, "model")
        except (OSError, ValueError, LookupError) as error:  # a resolver's, of a LoRA, may be any of them
            return _echoing_little(refusal(error, str(request.model), "model"), request)
        return refused

    return check_model


def _take_mix(serving: Any, request: Any) -> None:
    """Makes the mix that a request's body has in its field `merged_adapters` the name of its model.

    Raises:
        MixNameError: the field means no mix, or the model is not the base model, or no text.
    """
    if not request.model and (named := bodies.named_model()):
        if not isinstance(named, str):
            raise MixNameError(f"model must be a name, not {short(named)}.")
        request.model = named
    given = bodies.take(request)
    if given is None:
        return
    name, models = spelled(read_merged_adapters(given)), serving.models
    if request.model == name:  # it was taken before
        return
    is_base = serving._is_model_supported(request.model) and request.model not in models.lora_requests
    if not is_base or _named_mix(models, request.model) is not None:
        raise MixNameError(f"With {FIELD}, model must be the base model, not `{short(request.model)}`.")
    request.model = name


def _check_pooling_model(original: Callable[..., Any]) -> Callable[..., Any]:
    async def check_model(self: Any, request: Any) -> None:
        """As for generation, in the place of a method that looks at no body and lets unknown names pass.

        Raises:
            VLLMNotFoundError: what the request names is not served.
            GracefulHTTPError: with the status of another refusal.
        """
        refused = await BaseServing._check_model(self, request)
        if refused is not None:
            _raise(refused)

    return check_model


def _check_realtime_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def check_model(self: Any, model: str | None) -> Any:
        """None where a WebSocket's session names the base model; vLLM knows no other there."""
        return _echoing_little(original(self, model), SimpleNamespace(model=model))

    return check_model


def _raise(refused: Any) -> None:
    """Raises what vLLM answers as this ErrorResponse."""
    if refused.error.code == HTTPStatus.NOT_FOUND:
        raise VLLMNotFoundError(refused.error.message)
    raise GracefulHTTPError(refused.error.message, HTTPStatus(refused.error.code))


def _maybe_get_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_get_adapters(self: Any, request: Any, supports_default_mm_loras: bool = False) -> LoRARequest | None:
        """What the engine is told about the request's adapter."""
        _take_mix(self, request)
        source = requested_source(self.models, request.model)
        if source is None:
            made = original(self, request, supports_default_mm_loras)
        else:
            try:
                _admission(self.models).admit_now(source)
            except (OSError, ValueError) as error:  # of what was loaded again since the request was checked
                _raise(refusal(error, str(request.model), "model"))
            made = _requests(self.models).mix(source)
            told(self.models.engine_client).add(made, is_ia3=True)
        if made is not None:
            metrics.count(made, self.models.engine_client)
        return made

    return maybe_get_adapters


def _requests(models: Any) -> Requests:
    """The requests of this server's OpenAIServingModels."""
    known: Requests = models.ia3rt_requests
    return known


def _admission(models: Any) -> Admission:
    """What this server's OpenAIServingModels lets go to the engine."""
    admission: Admission = models.ia3rt_admission
    return admission


def _echoing_little(answer: Any, request: Any) -> Any:
    """An answer of vLLM's; an error does not repeat all of a long name or path."""
    if hasattr(answer, "error"):
        for part in ("model", "lora_name", "lora_path"):
            given = getattr(request, part, None)
            if isinstance(given, str) and given != short(given):
                for whole in (given, sanitize_message(given)):  # vLLM takes paths out of what it says
                    answer.error.message = answer.error.message.replace(whole, short(whole))
    return answer


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


def _stored(models: Any) -> set[Path]:
    """The copies of all IA³ adapters that are loaded."""
    return {Path(request.lora_path) for request in models.lora_requests.values() if is_stored(request)}


def _forget(models: Any, folder: Path) -> None:
    """Removes the copy of an adapter that the workers refused, where it is nobody's."""
    keeping().hold_only(_stored(models))
    discard(folder)


async def _look_after(models: Any, name: str | None) -> None:
    """Sees that the copies of what a request wears are as they were stored, or are again.

    Raises:
        DamagedCopyError: one is not, and its original cannot give it back.
        StoreError: the store cannot be written.
        SlowLoadError: that took too long.
    """
    mix = _named_mix(models, name)
    for adapter in (name,) if mix is None else mix.adapters:
        request = models.lora_requests.get(adapter)
        if request is not None and is_stored(request) and not keeping().is_as_it_was(Path(request.lora_path)):
            await apart(keeping().mend, Path(request.lora_path), adapter)
