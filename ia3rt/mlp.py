"""MLPs whose input site is scaled where the product act(gate) · up is formed, so that it costs no pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ia3rt import eager, ops
from ia3rt.modules import IA3Layer, Wearer, original_class
from ia3rt.sites import Site

# What the kernel computes, by the class of the activation module; transformers' and torch's names.
_KINDS: dict[str, str] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


class Form(NamedTuple):
    """How an MLP computes.

    Attributes:
        forward: the forward, as its source is written; a class is of this form if its own compiles to the same.
        gate_and_up: (mlp, x) to the activation's argument and what its result is multiplied by, if anything.
        activation: the name of the activation module.
        down: the name of the second matrix, whose input the vector scales.
        finish: (mlp, h) to the MLP's result.
    """

    forward: Callable[..., Any]
    gate_and_up: Callable[[Any, Tensor], tuple[Tensor, Tensor | None]]
    activation: str
    down: str
    finish: Callable[[Any, Tensor], Tensor]


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


def _gated(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return mlp.gate_proj(x), mlp.up_proj(x)


def _halves(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    return gate, up


def _single(name: str) -> Callable[[Any, Tensor], tuple[Tensor, None]]:
    return lambda mlp, x: (getattr(mlp, name)(x), None)


def _then(name: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda mlp, h: getattr(mlp, name)(h)


FORMS: tuple[Form, ...] = (
    Form(_llama, _gated, "act_fn", "down_proj", _then("down_proj")),
    Form(_llama_returned, _gated, "act_fn", "down_proj", _then("down_proj")),
    Form(_phi3, _halves, "activation_fn", "down_proj", _then("down_proj")),
    Form(_opt, _single("fc1"), "activation_fn", "fc2", _then("fc2")),
    Form(_nemotron, _single("up_proj"), "act_fn", "down_proj", _then("down_proj")),
    Form(_gpt2, _single("c_fc"), "act", "c_proj", lambda mlp, h: mlp.dropout(mlp.c_proj(h))),
    Form(_gpt_neox, _single("dense_h_to_4h"), "act", "dense_4h_to_h", _then("dense_4h_to_h")),
)


def form_of(mlp: nn.Module) -> Form | None:
    """The form whose forward compiles to the same as the module's: by what it computes, not by its class's name."""
    return _form_of_class(original_class(type(mlp)))


def _form_of_class(cls: type) -> Form | None:
    code = getattr(cls.forward, "__code__", None)  # type: ignore[attr-defined]
    for form in FORMS:
        expected = form.forward.__code__
        if code is not None and (code.co_code, code.co_names) == (expected.co_code, expected.co_names):
            return form
    return None


class IA3MLP(Wearer):
    """An MLP of a known form, which scales the input of its second matrix as that is formed.

    Attributes:
        ia3_form: the form, of the drop-in class.
    """

    ia3_form: ClassVar[Form | None]

    def __init_subclass__(cls) -> None:
        """Recognises the form once, when the drop-in class is made."""
        super().__init_subclass__()
        cls.ia3_form = _form_of_class(original_class(cls))

    def forward(self, x: Tensor) -> Tensor:
        """down(s ∘ act(gate) ∘ up); the rounding is that of scaling the second matrix's input."""
        form, routing = self.ia3_form, self.ia3_routing
        assert form is not None and self.ia3_in is not None
        gate, up = form.gate_and_up(self, x)
        activation = getattr(self, form.activation)
        kind = _KINDS.get(type(activation).__name__)
        if routing.backend == "triton" and kind is not None:
            tables = routing.tables
            h = ops.activation(gate, up, tables.bank[self.ia3_in], tables.mixes, tables.route, kind)
            return form.finish(self, h)
        h = activation(gate)
        scale = routing.composed.scales[self.ia3_in]
        if up is not None:
            h = h * up
        if up is None and torch.is_grad_enabled():
            h = eager.scale_input(h, scale, routing.tokens)  # the activation may need its result for its gradient
        else:
            eager.scale_output_(h, scale, routing.tokens)
        return form.finish(self, h)

    @classmethod
    def is_fused(cls, module: nn.Module) -> bool:
        """Whether the kernel knows the activation."""
        form = form_of(module)
        return form is not None and type(getattr(module, form.activation)).__name__ in _KINDS


def wearer_of(modules: Mapping[str, nn.Module], site: Site) -> tuple[nn.Module, type[Wearer]]:
    """The module that applies a site's vector, and its drop-in: the MLP around a second matrix, else the layer."""
    layer = modules[site.path]
    parent, _, name = site.path.rpartition(".")
    mlp = modules[parent]
    form = form_of(mlp) if site.side == "in" else None
    if form is not None and form.down == name and ("forward" not in vars(mlp) or "_old_forward" in vars(mlp)):
        return mlp, IA3MLP
    return layer, IA3Layer
