"""The models that benchmarks run on: built-in shapes with random weights, folders, and Hugging Face ids."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ia3rt.bench.settings import Settings
from ia3rt.bench.shapes import SHAPES, Shape
from ia3rt.cli.errors import UsageError
from ia3rt.cli.models import check_model, why_not

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 0


def shape_of(settings: Settings) -> Shape | None:
    """The built-in shape that is meant, or None where the model is a folder or an id.

    Raises:
        UsageError: --layers without a built-in shape, or fewer than one.
    """
    shape = SHAPES.get(settings.model)
    if settings.layers is None:
        return shape
    if shape is None:
        raise UsageError("--layers", f"goes with a built-in shape ({', '.join(SHAPES)}), not with {settings.model!r}")
    if settings.layers < 1:
        raise UsageError("--layers", "a model has at least one layer")
    return dataclasses.replace(shape, layers=settings.layers, whole=shape.whole and shape.layers == settings.layers)


def title_of(settings: Settings) -> str:
    """What the model is called in results; a model that is cut says so."""
    shape = shape_of(settings)
    if shape is None:
        return str(settings.model)
    layers = "1 layer" if shape.layers == 1 else f"{shape.layers} layers"
    cut = "" if shape.whole else f", {layers} only, vocabulary {shape.vocabulary:,}"
    return f"{shape.name}{cut}, random weights"


def build_model(settings: Settings) -> PreTrainedModel:
    """The model on its device, in eval mode, frozen.

    Raises:
        UsageError: there is no such model.
    """
    shape = shape_of(settings)
    model: Any = _random(shape, settings) if shape is not None else _pretrained(settings)
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _random(shape: Shape, settings: Settings) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(SEED)
    with settings.device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=settings.dtype)  # type: ignore[no-untyped-call]
    return model


def _pretrained(settings: Settings) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    check_model(settings.model, "--model")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype)
    except (OSError, ValueError) as error:
        raise UsageError("--model", f"{why_not(settings.model, error)} (built in are {', '.join(SHAPES)})") from error
    return model.to(settings.device)  # type: ignore[no-any-return]


def clone(model: nn.Module, own: Collection[str] = ()) -> Any:
    """A model of its own whose weights are the same tensors as `model`'s, so that it costs no memory.

    Args:
        model: what to copy.
        own: paths of modules whose weights are copied too, because they will be written to.
    """
    copied = {id(parameter) for path in own for parameter in model.get_submodule(path).parameters()}
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors if id(tensor) not in copied})
