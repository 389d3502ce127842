"""MLPs whose input site is scaled where the product act(gate) · up is formed, so that it costs no pass of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ia3rt import eager, ops
from ia3rt.autocast import autocast
from ia3rt.modules import How, Wearer, computing_tensor, dense_weight, original_class
from ia3rt.sites import Side

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
        first: the names of the first matrices: that of the activation's argument, and that of what its result is
            multiplied by, if anything; one name where one matrix gives both.
        activation: the name of the activation module.
        down: the name of the second matrix, whose input the vector scales.
        finish: (mlp, h) to the MLP's result.
        halves: whether one matrix gives both.
    """

    forward: Callable[..., Any]
    first: tuple[str, ...]
    activation: str
    down: str
    finish: Callable[[Any, Tensor], Tensor]
    halves: bool = False

    def gate_and_up(self, mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The activation's argument, and what its result is multiplied by, if anything."""
        results = [getattr(mlp, name)(x) for name in self.first]
        gate, up = results[0].chunk(2, dim=-1) if self.halves else ([*results, None])[:2]
        return gate, up

    def first_matrices(self, mlp: nn.Module, dtype: torch.dtype) -> tuple[Tensor | None, ...] | None:
        """The weight and bias of the one, and of the other; None where the modules have to run, as in another dtype."""
        found: list[Tensor | None] = []
        for name in self.first:
            layer = getattr(mlp, name)
            weight, bias = dense_weight(layer)
            if weight is None or weight.dtype != dtype or _does_more(layer):
                return None
            found += (weight, bias)
        if self.halves:
            weights, biases = ((None, None) if tensor is None else tensor.chunk(2) for tensor in found)
            return weights[0], biases[0], weights[1], biases[1]
        return (*found, None, None)[:4]


def _does_more(layer: nn.Module) -> bool:
    """Whether calling a layer does more than multiply: it wears a vector, has hooks, or another forward of its own."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    wears = isinstance(layer, Wearer) and (layer.ia3_in is not None or layer.ia3_out is not None)
    return wears or any(hooks) or "forward" in vars(layer) or _has_any_global_hook()  # type: ignore[no-untyped-call]


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


def _then(name: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda mlp, h: getattr(mlp, name)(h)


FORMS: tuple[Form, ...] = (
    Form(_llama, ("gate_proj", "up_proj"), "act_fn", "down_proj", _then("down_proj")),
    Form(_llama_returned, ("gate_proj", "up_proj"), "act_fn", "down_proj", _then("down_proj")),
    Form(_phi3, ("gate_up_proj",), "activation_fn", "down_proj", _then("down_proj"), halves=True),
    Form(_opt, ("fc1",), "activation_fn", "fc2", _then("fc2")),
    Form(_nemotron, ("up_proj",), "act_fn", "down_proj", _then("down_proj")),
    Form(_gpt2, ("c_fc",), "act", "c_proj", lambda mlp, h: mlp.dropout(mlp.c_proj(h))),
    Form(_gpt_neox, ("dense_h_to_4h",), "act", "dense_4h_to_h", _then("dense_4h_to_h")),
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
        activation = getattr(self, form.activation)
        kind = _KINDS.get(type(activation).__name__)
        if routing.backend == "triton" and kind is not None:
            tables = routing.tables
            worn = tables.bank[self.ia3_in], tables.mixes, tables.route, kind
            matrices = form.first_matrices(self, x.dtype) if routing.fuses_gate_up else None
            if matrices is not None:
                return form.finish(self, ops.gate_up(*autocast(x, *matrices), *worn))
            return form.finish(self, ops.activation(*form.gate_and_up(self, x), *worn))
        gate, up = form.gate_and_up(self, x)
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

    def ia3_how(self, side: Side, rows: int) -> How:
        """As `forward` chooses."""
        form, routing = self.ia3_form, self.ia3_routing
        assert form is not None
        activation = getattr(self, form.activation)
        kind, weight = _KINDS.get(type(activation).__name__), computing_tensor(getattr(self, form.down))
        if routing.backend == "torch" or kind is None:
            known = "" if routing.backend == "torch" else f"; no kernel knows {type(activation).__name__}"
            return How(
                "multiplication", "", f"in place in what the activation gives, before {form.down} reads it{known}"
            )
        from ia3rt.kernels.configs import activation_config  # not before: Triton may not be installed

        matrices = form.first_matrices(self, weight.dtype) if routing.fuses_gate_up else None
        if matrices is not None:
            from ia3rt.kernels.gate_up import plan

            gate, _, up, _ = matrices
            assert gate is not None
            x, y = weight.new_empty(rows, gate.shape[1]), weight.new_empty(rows, gate.shape[0])
            config = plan(x, gate, up, y, routing.route.index is None)
            words = "torch, then the activation" if config is None else config.in_words()
            return How("gate_up", words, "patch(fuse_gate_up=True): what the vector scales is formed in the epilogue")
        config = activation_config(rows, self.ia3_routing.bank.widths[self.ia3_in or 0], weight.dtype)
        words = f"{config.block_m}×{config.block_n}, {config.num_warps} warps"
        return How(
            "activation", words, "the kernel reads act's argument and writes the product: the vector costs no pass"
        )
