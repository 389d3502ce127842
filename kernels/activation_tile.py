"""The activations of an MLP, on a tile in fp32; activation.py and gate_up.py use them.

silu        z σ(z)                                      Elfwing et al. 2017
gelu        z Φ(z),  Φ(z) = (1 + erf(z / √2)) / 2       Hendrycks & Gimpel 2016
gelu_tanh   z (1 + tanh(u)) / 2 = z σ(2u),  u = √(2/π) (z + 0.044715 z³)
quick_gelu  z σ(1.702 z)
relu        max(z, 0)
relu2       max(z, 0)²                                  So et al. 2021
"""
# Triton's decorator and its tensor language carry no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)  # 1 / √2
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # the normal density at 0, 1 / √(2π)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)  # 2 √(2/π)


@triton.jit
def _logistic(z):
    """Return σ(z) and 1 − σ(z). The exponent is never positive, so nothing overflows and neither loses its digits."""
    e = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@triton.jit
def activate(z, KIND: tl.constexpr):
    """Return act(z) and its derivative, for z in fp32. A NaN stays one; the compiler drops what is not used."""
    if KIND == "relu":
        act = tl.where(z <= 0, 0.0, z)
        slope = tl.where(z <= 0, 0.0, 1.0)
    elif KIND == "relu2":
        positive = tl.where(z <= 0, 0.0, z)
        act = positive * positive
        slope = 2.0 * positive
    elif KIND == "gelu":
        p = 0.5 + 0.5 * tl.erf(z * SQRT_HALF)
        act = z * p
        slope = p + z * (DENSITY_AT_0 * tl.exp(-0.5 * z * z))
    else:  # z σ(g(z))
        if KIND == "silu":
            g = z
            dg = 1.0
        elif KIND == "quick_gelu":
            g = 1.702 * z
            dg = 1.702
        else:
            tl.static_assert(KIND == "gelu_tanh")
            # σ has long been 0 or 1 where the square is 1e4; an infinite one would make the slope 0 · ∞.
            square = tl.minimum(z * z, 1e4)
            g = SQRT_8_OVER_PI * z * (1.0 + 0.044715 * square)
            dg = SQRT_8_OVER_PI * (1.0 + 0.134145 * square)
        p, q = _logistic(g)
        act = z * p
        slope = p + act * q * dg
    return act, slope
