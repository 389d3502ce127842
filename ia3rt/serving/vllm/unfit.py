"""Layers at which no vector can act in vLLM, and why: they run on other rows than the step's tokens, or are passed by.

What a token wears is known by its place in the step. What of this is seen of the model and the options is said when an
adapter is loaded; the rest a layer sees when it runs, where nothing is compiled (layers.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import CrossAttention, MLAAttention

from ia3rt.serving.vllm.layers import IA3Layer

_ENCODER = "which runs on what the encoder sees, and vLLM says only of the text's tokens who wears what"
_EXPERTS = "which gets a part of the tokens where experts are spread over processes: leave --enable-expert-parallel out"
_LATENT = "which vLLM's latent attention takes apart: it multiplies by parts of the weight itself. Leave it out"


def refuse_unfit(
    model: nn.Module, wearing: Mapping[str, IA3Layer], packed: Mapping[str, list[str]], vllm_config: Any
) -> None:
    """Writes onto each layer that can wear no vector why not, as `ia3_refusal`.

    Args:
        model: vLLM's, its layers replaced.
        wearing: those that could wear one, by name.
        packed: by a layer's name, the checkpoint's names of those packed into it.
        vllm_config: vLLM's.
    """
    everywhere = _of_options(model, vllm_config)
    latent = {id(_plain(module.kv_b_proj)) for module in model.modules() if isinstance(module, MLAAttention)}
    parts = [*_encoders(model), *_shared_out(model)]
    for name, layer in wearing.items():
        above = name.rpartition(".")[0]
        if everywhere is not None:
            layer.ia3_refusal = everywhere
        elif id(layer.base_layer) in latent:
            layer.ia3_refusal = _LATENT
        elif _is_of_encoder(model.get_submodule(above), packed.get(name, [name])):
            layer.ia3_refusal = _ENCODER
        else:
            layer.ia3_refusal = next((why for part, why in parts if f"{name}.".startswith(f"{part}.")), None)


def _plain(layer: Any) -> Any:
    """vLLM's own layer."""
    return getattr(layer, "base_layer", layer)


def _of_options(model: nn.Module, vllm_config: Any) -> str | None:
    """What splits every step, or all layers from one on."""
    shares = any(getattr(module, "kv_sharing_target_layer_name", None) for module in model.modules())
    parallel = vllm_config.parallel_config
    for option, is_on in (
        ("--kv-sharing-fast-prefill", vllm_config.cache_config.kv_sharing_fast_prefill and shares),
        ("--enable-dbo or --ubatch-size", parallel.use_ubatching),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size > 1),
    ):
        if is_on:
            return f"and with {option} layers run on a part of a step's tokens: start the server without it"
    return None


def _encoders(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Encoders that vLLM gives what the text has for LoRAs, as Whisper's."""
    yield from ((name, _ENCODER) for name in getattr(model, "_tower_model_names", ()))


def _shared_out(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if getattr(module, "is_sequence_parallel", False):
            yield name, _EXPERTS


def _is_of_encoder(above: nn.Module, packed: list[str]) -> bool:
    """Whether a layer makes the keys and values that the text looks up in what the encoder saw."""
    crosses = any(isinstance(child, CrossAttention) for child in above.children())
    return crosses and {name.rpartition(".")[2] for name in packed} <= {"k_proj", "v_proj"}
