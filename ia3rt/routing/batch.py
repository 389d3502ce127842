"""The rows of a batch, among the arguments of a forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Arguments: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
"""Of a call: those that are given by place, and those that are given by name."""

_MAIN = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
_CACHES = ("cache", "past_key_values", "cache_params", "past_bucket_states", "mems")
# What a model keeps of the tokens before, and where their number can be read.
_COUNTED = ("cache", "past_key_values", "cache_params")
_KEPT = (*_COUNTED, "state", "mems", "past_buckets_states")
# What belongs to the tokens and not to the rows, or says where the rows are and not what is in them.
_NOT_MARKED = ("mask", "position", "cache")
# Beside text, these are counted in images or clips, of which a row has as many as it has.
_MEDIA = ("pixel", "image", "video", "vision", "audio", "input_features", "input_values", "speech", "patch", "mm_")


def named_arguments(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a function by name, in the order of its parameters; those without a name by their number.

    Where none is a tensor, those in a mapping among them are arguments too.

    Args:
        names: its parameters'; empty where they are not looked up.
        args: those that were given by place.
        kwargs: those that were given by name, in any order.
    """
    given = {**{_name(names, at): value for at, value in enumerate(args)}, **kwargs}
    if not any(isinstance(value, Tensor) for value in given.values()):
        for value in tuple(given.values()):
            if isinstance(value, Mapping):  # all of them in one, as sentence-transformers has it
                given.update((name, each) for name, each in value.items() if isinstance(name, str))
    return {name: given[name] for name in dict.fromkeys((*names, *given)) if name in given}


def main_input(arguments: Mapping[str, Any], model: nn.Module | None = None) -> Tensor | None:
    """The input that is counted in rows, [rows, ...]: text where there is any, else what the model calls its main one.

    Else it is the first tensor that is no mask.
    """
    for name in (*_MAIN, getattr(model, "main_input_name", ""), "hidden_states"):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
    inputs = (value for name, value in arguments.items() if not any(part in name for part in _NOT_MARKED))
    return next((value for value in inputs if isinstance(value, Tensor) and value.dim() > 0), None)


def row_inputs(arguments: Mapping[str, Any], rows: int) -> Iterator[Tensor]:
    """The inputs of which each row of the batch has one."""
    text = has_text(arguments)
    for name, value in arguments.items():
        if not is_of_rows(name):
            continue
        if text and is_media(name):
            continue
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows:
                yield leaf


def media_inputs(arguments: Mapping[str, Any], count: int) -> Iterator[Tensor]:
    """The inputs of which each image has one."""
    for name, value in arguments.items():
        counted = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
        if is_media(name) and counted and value.is_floating_point():
            yield value


def with_own_rows(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The same arguments, where rows that are one in memory, as `expand` gives them, have numbers of their own.

    Args:
        names: of the parameters.
        args: those that were given by place.
        kwargs: those that were given by name.
    """

    def own(name: str, value: Any) -> Any:
        is_one = is_of_rows(name) and any(map(_is_one, tree_leaves(value)))
        return tree_map_only(Tensor, _own, value) if is_one else value

    placed = tuple(own(_name(names, at), value) for at, value in enumerate(args))
    return placed, {name: own(name, value) for name, value in kwargs.items()}


def _name(names: Sequence[str], at: int) -> str:
    """What an argument that is given by place is called."""
    return names[at] if at < len(names) else str(at)


def is_of_rows(name: str) -> bool:
    """Whether an argument may say what is in the rows, and not where they are or what came before."""
    return name not in _CACHES and not any(part in name for part in _NOT_MARKED)


def _is_one(x: object) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and x.dim() > 0 and len(x) > 1 and x.stride(0) == 0


def _own(x: Tensor) -> Tensor:
    return x.contiguous() if _is_one(x) else x


def made_up(model: nn.Module, names: Sequence[str], rows: int) -> dict[str, Tensor]:
    """Text of a few tokens for the inputs of a forward that are text."""
    device = next(model.parameters()).device
    ids = (torch.arange(rows * 5, device=device) % 2).view(rows, 5)
    made: dict[str, Tensor] = {}
    for name in names:
        if name.endswith("input_ids") or name in ("labels", "0"):
            made["input_ids" if name == "0" else name] = ids
        elif name.endswith("inputs_embeds"):
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
            made[name] = embeddings(ids)
    return made


def has_text(arguments: Mapping[str, Any]) -> bool:
    """Whether text is among the inputs; not what a decoder says of what it hears or sees."""
    return any(arguments.get(name) is not None for name in ("input_ids", "inputs_embeds"))


@lru_cache(1024)
def is_media(name: str) -> bool:
    """Whether an argument holds images, sounds or the like."""
    return any(part in name for part in _MEDIA) and not name.startswith(("decoder_", "encoder_"))


def cached(arguments: Mapping[str, Any]) -> int | None:
    """How many tokens of each row came before a forward; None where what the model keeps of them does not say."""
    name, kept = next(((name, arguments[name]) for name in _KEPT if arguments.get(name) is not None), ("", None))
    if kept is None:
        return 0
    if name not in _COUNTED or not hasattr(kept, "get_seq_length"):
        return None
    are_linear = getattr(kept, "is_linear", ())
    if are_linear and all(are_linear):  # Mamba's: a state of each layer, and no token
        return None if kept.has_previous_state() else 0
    return int(kept.get_seq_length())


def takes_text(model: nn.Module) -> bool:
    """Whether a model's forward takes text, beside which images are counted by themselves."""
    return "input_ids" in parameter_names(model) or "inputs_embeds" in parameter_names(model)


def is_text(batch: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Whether a main input is one of tokens: their ids [rows, tokens], or a vector of each [rows, tokens, width]."""
    if not has_text(arguments) and any(is_media(name) for name in arguments):
        return False
    return batch.dim() == (3 if batch.is_floating_point() else 2)


def parameter_names(model: nn.Module) -> list[str]:
    """What a model's forward calls its arguments, as far as they may be given by place."""
    return _parameters(type(model))  # type: ignore[arg-type]


@lru_cache(256)
def _parameters(cls: type[nn.Module]) -> list[str]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in positional]
