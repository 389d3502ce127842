"""The operations as torch.library custom ops: dispatch (triton | torch), shapes for tracing, and gradients.

    torch.ops.ia3rt.scale        y = s ∘ x
    torch.ops.ia3rt.linear       y = s_out ∘ (W (s_in ∘ x) + b)
    torch.ops.ia3rt.linear_quantised  the same of a weight that stays quantised
    torch.ops.ia3rt.linear_pair  y_a = s_a ∘ (W_a x + b_a), y_b = s_b ∘ (W_b x + b_b)
    torch.ops.ia3rt.activation   y = s ∘ act(gate) ∘ up
    torch.ops.ia3rt.attention    y = s_v ∘ softmax((s_k ∘ q) kᵀ) v
    torch.ops.ia3rt.gate_up      y = s ∘ act(W_gate x + b_gate) ∘ (W_up x + b_up)

Triton runs what is on a GPU, and anything where TRITON_INTERPRET=1, of which bfloat16 comes out wrong without what
tests/triton_interpreter.py mends; ia3rt.reference runs the rest, and all of it where Triton is not installed. It says
how a bank's slice, `mixes` and `route` are laid out. Ids and slots are not checked to be in range: they live on the
device, and reading them would stall it.

An op knows tensors, no adapters and no modules. It may import `kernels` and `reference`.
"""

from ia3rt.ops._activation import activation, activation_gradient
from ia3rt.ops._attention import attention, attention_gradient
from ia3rt.ops._bound import Bound, Callee
from ia3rt.ops._dispatch import backend, needs_torch
from ia3rt.ops._gate_up import gate_up
from ia3rt.ops._linear import linear, linear_pair
from ia3rt.ops._quantised import linear_quantised
from ia3rt.ops._rope import rope, rope_gradient, rope_into_cache
from ia3rt.ops._scale import bank_gradient, scale

__all__ = [
    "Bound",
    "Callee",
    "activation",
    "activation_gradient",
    "attention",
    "attention_gradient",
    "backend",
    "bank_gradient",
    "gate_up",
    "linear",
    "linear_pair",
    "linear_quantised",
    "needs_torch",
    "rope",
    "rope_gradient",
    "rope_into_cache",
    "scale",
]
