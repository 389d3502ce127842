"""MLPs whose second layer's input is scaled where the activation forms it, known by what their forward compiles to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ia3rt.ops import backend
from ia3rt.serving.vllm.layers import IA3RowParallelLinear

KINDS = {"SiluAndMul": "silu", "GeluAndMul": "gelu"}
"""What the kernel computes, by the class of vLLM's activation."""


def _llama(self, x):  # type: ignore[no-untyped-def]
    x, _ = self.gate_up_proj(x)
    x = maybe_fused_act_quant(self.act_fn, x, self.down_proj)  # type: ignore[name-defined]  # noqa: F821
    x, _ = self.down_proj(x)
    return x


def _qwen(self, x):  # type: ignore[no-untyped-def]
    gate_up, _ = self.gate_up_proj(x)
    x = self.act_fn(gate_up)
    x, _ = self.down_proj(x)
    return x


def _mistral(self, x):  # type: ignore[no-untyped-def]
    x, _ = self.gate_up_proj(x)
    x = self.act_fn(x)
    x, _ = self.down_proj(x)
    return x


_FORMS = (_llama, _qwen, _mistral)


class ScaledActivation(nn.Module):
    """vLLM's activation with the vector of the layer behind it, in one kernel.

    Args:
        activation: SiluAndMul, say.
        down: the layer behind it.
        kind: what the activation computes, as kernels/activation.py calls it.
    """

    def __init__(self, activation: nn.Module, down: IA3RowParallelLinear, kind: str) -> None:
        super().__init__()
        self.activation = activation
        self.kind = kind
        self._down = [down]  # in a list: the model has the layer already

    def forward(self, x: Tensor) -> Tensor:
        """Computes act(gate) ∘ up ∘ l.

        Args:
            x: [..., 2 width], gate before up.
        """
        down = self._down[0]
        table = down.ia3_tables.get("in")
        if table is not None and down.ia3_fits(x):
            return table.activation(x, self.kind)
        plain: Tensor = self.activation(x)
        return plain


def scale_in_activations(model: nn.Module) -> None:
    """Moves input vectors to the activations before their layers, where the MLP's forward is known.

    Where kernels compute, into the activation; else onto its result, in place, as nothing else reads it.
    """
    for mlp in list(model.modules()):
        down, activation = getattr(mlp, "down_proj", None), getattr(mlp, "act_fn", None)
        kind = KINDS.get(type(activation).__name__)
        exact = getattr(activation, "approximate", "none") == "none"
        if not (isinstance(down, IA3RowParallelLinear) and kind is not None and exact and _is_known(type(mlp))):
            continue
        down.ia3_input = "own"
        if backend(torch.empty(0, device=down.device)) == "triton":
            down.ia3_input = "scaled"
            mlp.act_fn = ScaledActivation(activation, down, kind)  # type: ignore[arg-type]


def _is_known(mlp: type) -> bool:
    code = getattr(mlp.forward, "__code__", None)  # type: ignore[attr-defined]
    known = [(form.__code__.co_code, form.__code__.co_names) for form in _FORMS]
    return code is not None and (code.co_code, code.co_names) in known
