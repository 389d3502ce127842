"""What a request means by its model and its body, at every endpoint: the base model, an adapter, a mix, or an error.

Each function stands for a method of vLLM's, which `install` puts it in front of; what concerns no IA³ adapter goes on
to that method.

Mixes do not come from a LoRAResolver: vLLM asks those only where adapters may be loaded at runtime, and keeps what they
find as a loaded adapter, which would go on with an adapter's old numbers after that was loaded again.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm import envs
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling.handlers import validation
from vllm.entrypoints.speech_to_text.realtime.connection import RealtimeConnection
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError
from vllm.lora.request import LoRARequest

from ia3rt.adapters.mix import Mix
from ia3rt.adapters.mix_text import MixNameError, canonical, parse, spelled
from ia3rt.adapters.shortened import ECHO, short
from ia3rt.serving.vllm import bodies, metrics
from ia3rt.serving.vllm.hints import hint
from ia3rt.serving.vllm.keeping import keeping
from ia3rt.serving.vllm.loading import apart
from ia3rt.serving.vllm.merged_adapters import FIELD, read_merged_adapters
from ia3rt.serving.vllm.refusals import echoing_little, refusal
from ia3rt.serving.vllm.requests import is_stored
from ia3rt.serving.vllm.served import admission_of, requests_of
from ia3rt.serving.vllm.source import Source
from ia3rt.serving.vllm.told_engine import told


class UnknownAdapterError(VLLMNotFoundError):
    """A mix of an adapter that is not loaded, or not any more."""


def install() -> None:
    """Puts the functions of this file in front of vLLM's methods."""
    for owner, name, made in (
        (BaseServing, "_check_model", _check_model),
        (BaseServing, "_maybe_get_adapters", _maybe_get_adapters),
        (PoolingBaseServing, "_check_model", _check_pooling_model),
        (RealtimeConnection, "_check_model", _check_realtime_model),
    ):
        setattr(owner, name, made(getattr(owner, name)))
    validation._MAX_ERROR_INPUT_CHARS = ECHO  # of a name that is no text


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


def _check_model(original: Callable[..., Any]) -> Callable[..., Any]:
    async def check_model(self: Any, request: Any) -> Any:
        """None where what the request names is served, or an error; a body's mix becomes the name of its model."""
        try:
            _take_mix(self, request)
            await _resolve(self.models, request.model)
            refused: Any = None
            source = requested_source(self.models, request.model)
            if source is None:
                refused = echoing_little(await original(self, request), request)
            if getattr(refused, "error", None) is None:
                await _look_after(self.models, request.model)
            elif refused.error.code == HTTPStatus.NOT_FOUND:
                known = chain((base.name for base in self.models.base_model_paths), self.models.lora_requests)
                told = hint(request.model, request.model, known)
                refused.error.message = refused.error.message.rstrip(".") + "." + told
            if source is not None:
                await admission_of(self.models).admit(source)
        except UnknownAdapterError as error:
            return self.create_error_response(str(error), "NotFoundError", HTTPStatus.NOT_FOUND, "model")
        except MixNameError as error:
            return self.create_error_response(str(error), "BadRequestError", HTTPStatus.BAD_REQUEST, "model")
        except (OSError, ValueError, LookupError) as error:  # a resolver's, of a LoRA, may be any of them
            return echoing_little(refusal(error, str(request.model), "model"), request)
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
        return echoing_little(original(self, model), SimpleNamespace(model=model))

    return check_model


def _maybe_get_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_get_adapters(self: Any, request: Any, supports_default_mm_loras: bool = False) -> LoRARequest | None:
        """What the engine is told about the request's adapter."""
        _take_mix(self, request)
        source = requested_source(self.models, request.model)
        if source is None:
            made = original(self, request, supports_default_mm_loras)
        else:
            try:
                admission_of(self.models).admit_now(source)
            except (OSError, ValueError) as error:  # of what was loaded again since the request was checked
                _raise(refusal(error, str(request.model), "model"))
            made = requests_of(self.models).mix(source)
            told(self.models.engine_client).add(made, is_ia3=True)
        if made is not None:
            metrics.count(made, self.models.engine_client)
        return made

    return maybe_get_adapters


def _raise(refused: Any) -> None:
    """Raises what vLLM answers as this ErrorResponse."""
    if refused.error.code == HTTPStatus.NOT_FOUND:
        raise VLLMNotFoundError(refused.error.message)
    raise GracefulHTTPError(refused.error.message, HTTPStatus(refused.error.code))
