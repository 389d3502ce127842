"""The MLPs whose second matrix's input can be scaled where it is formed, known by what their forward compiles to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ia3rt.modules import bare
from ia3rt.modules.same_code import same_code
from ia3rt.modules.wearer import Wearer, original_class
from ia3rt.modules.weights import dense_weight

_KINDS: dict[str, dict[str, str]] = {
    "torch.nn.modules.activation": {"SiLU": "silu", "ReLU": "relu"},
    "transformers.activations": {
        "SiLUActivation": "silu",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
        "QuickGELUActivation": "quick_gelu",
        "ReLUSquaredActivation": "relu2",
    },
}


def kind_of(activation: nn.Module | None) -> str | None:
    """What the kernel computes for an activation, of a class of torch's or transformers' own; None for any other."""
    cls = type(activation)
    kind = _KINDS.get(cls.__module__, {}).get(cls.__name__)
    return kind if kind is not None and _is_as_written(cls) else None


def is_of_a_library(activation: nn.Module) -> bool:
    """Whether an activation is one of torch's or transformers', which return what is new, or their argument itself."""
    cls = type(activation)
    return cls.__module__ in _KINDS and _is_as_written(cls)


def _is_as_written(cls: Any) -> bool:
    """Whether a class's forward is from its own module: what other code put in its place has that one's globals."""
    return getattr(cls.forward, "__globals__", None) is vars(sys.modules[cls.__module__])


class Form(NamedTuple):
    """How an MLP computes.

    Attributes:
        forward: the forward, as its source is written; a class is of this form if its own compiles to the same.
        first: the names of the first matrices: that of the activation's argument, and that of what its result is
            multiplied by, if anything; one name where one matrix gives both.
        activation: the name of the activation module.
        down: the name of the second matrix, whose input the vector scales.
        after: the name of the module that its result goes through, if any.
        halves: whether one matrix gives both.
    """

    forward: Callable[..., Any]
    first: tuple[str, ...]
    activation: str
    down: str
    after: str = ""
    halves: bool = False

    def gate_and_up(self, mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """The activation's argument, what its result is multiplied by, if anything, and whether both are ours alone."""
        modules = mlp._modules
        gate, ours = bare.linear(modules[self.first[0]], x)  # type: ignore[arg-type]
        if self.halves:
            gate, up = gate.chunk(2, dim=-1)
            return gate, up, ours
        if len(self.first) == 1:
            return gate, None, ours
        return gate, bare.linear(modules[self.first[1]], x)[0], ours  # type: ignore[arg-type]

    def first_matrices(self, mlp: nn.Module, dtype: torch.dtype) -> tuple[Tensor | None, ...] | None:
        """The weight and bias of the one, and of the other; None where the modules have to run, as in another dtype."""
        found: list[Tensor | None] = []
        for name in self.first:
            layer = getattr(mlp, name)
            weight, bias = dense_weight(layer)
            wears = isinstance(layer, Wearer) and (layer.ia3_in is not None or layer.ia3_out is not None)
            if weight is None or weight.dtype != dtype or wears or not bare.is_bare(layer):
                return None
            found += (weight, bias)
        if self.halves:
            weights, biases = ((None, None) if tensor is None else tensor.chunk(2) for tensor in found)
            return weights[0], biases[0], weights[1], biases[1]
        return (*found, None, None)[:4]


def _llama(self, x):  # type: ignore[no-untyped-def]
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _llama_returned(self, x):  # type: ignore[no-untyped-def]
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _phi3(self, hidden_states):  # type: ignore[no-untyped-def]
    up_states = self.gate_up_proj(hidden_states)

    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)

    return self.down_proj(up_states)


def _opt(self, hidden_states):  # type: ignore[no-untyped-def]
    hidden_states = self.fc1(hidden_states)
    hidden_states = self.activation_fn(hidden_states)
    hidden_states = self.fc2(hidden_states)
    return hidden_states


def _nemotron(self, x):  # type: ignore[no-untyped-def]
    return self.down_proj(self.act_fn(self.up_proj(x)))


def _gpt2(self, hidden_states):  # type: ignore[no-untyped-def]
    hidden_states = self.c_fc(hidden_states)
    hidden_states = self.act(hidden_states)
    hidden_states = self.c_proj(hidden_states)
    hidden_states = self.dropout(hidden_states)
    return hidden_states


def _gpt_neox(self, hidden_states):  # type: ignore[no-untyped-def]
    hidden_states = self.dense_h_to_4h(hidden_states)
    hidden_states = self.act(hidden_states)
    hidden_states = self.dense_4h_to_h(hidden_states)
    return hidden_states


FORMS: tuple[Form, ...] = (
    Form(_llama, ("gate_proj", "up_proj"), "act_fn", "down_proj"),
    Form(_llama_returned, ("gate_proj", "up_proj"), "act_fn", "down_proj"),
    Form(_phi3, ("gate_up_proj",), "activation_fn", "down_proj", halves=True),
    Form(_opt, ("fc1",), "activation_fn", "fc2"),
    Form(_nemotron, ("up_proj",), "act_fn", "down_proj"),
    Form(_gpt2, ("c_fc",), "act", "c_proj", after="dropout"),
    Form(_gpt_neox, ("dense_h_to_4h",), "act", "dense_4h_to_h"),
)


def form_of(mlp: nn.Module) -> Form | None:
    """The form whose forward compiles to the same as the module's: by what it computes, not by its class's name."""
    return form_of_class(original_class(type(mlp)))


def form_of_class(cls: type) -> Form | None:
    """The form of an MLP's class; None where it has none of these forms."""
    forward: object = getattr(cls, "forward", None)
    return next((form for form in FORMS if same_code(forward, form.forward)), None)
