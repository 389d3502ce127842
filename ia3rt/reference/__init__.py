"""Each operation in a few lines of plain torch: the truth that the kernels are compared with, and their stand-in.

A scale is composed in fp32, or in fp64 where the bank or the activation is; so a float64 call of anything here is the
exact formula (IA³, Liu et al. 2022, section 3.3), and all of it is differentiable. Its words:

    bank    [capacity, width]        one row an adapter; row 0 is all ones
    mixes   int32 [slots, 2 + 2K]    mode (0 product, 1 linear), count n, K bank rows, K weights (fp32 bits)
    route   int32 [R]                row m of M wears mix route[m // (M // R)]; R = 1 is the uniform batch

It imports nothing else of ia3rt: a truth stands alone.
"""

from ia3rt.reference._activation import (
    ACTIVATION_GRADIENTS,
    ACTIVATIONS,
    Activation,
    activation,
    activation_gradient,
)
from ia3rt.reference._attention import attention, attention_gradient
from ia3rt.reference._gate_up import gate_up
from ia3rt.reference._linear import linear, linear_pair
from ia3rt.reference._quantised import dequantise, linear_quantised
from ia3rt.reference._rope import rope, rope_gradient, rope_into_cache
from ia3rt.reference._scale import MixTable, bank_gradient, compose, scale, split_mixes

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_GRADIENTS",
    "Activation",
    "MixTable",
    "activation",
    "activation_gradient",
    "attention",
    "attention_gradient",
    "bank_gradient",
    "compose",
    "dequantise",
    "gate_up",
    "linear",
    "linear_pair",
    "linear_quantised",
    "rope",
    "rope_gradient",
    "rope_into_cache",
    "scale",
    "split_mixes",
]
