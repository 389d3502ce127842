"""Between two adapters along an arc."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ia3rt.adapters.combining.task_vectors import as_vector, task_vectors, weighted_total

_PARALLEL = 1e-6
"""Radians: below it arc and line are one to a float32; as near to π, rounding would choose the arc."""


def slerp(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """l = 1 + (sin((1 - t) Ω) τ_1 + sin(t Ω) τ_2) / sin Ω, Ω being the angle between τ_1 and τ_2.

    Spherical linear interpolation (Shoemake 1985, "Animating Rotation with Quaternion Curves", section 3.3), of task
    vectors, with the angle at this site. They keep their lengths, as is usual for models: halfway between two of one
    length there is one of that length, where a straight line passes nearer to the base model. Where τ_1 and τ_2 are
    parallel, or one of them is 0 as where an adapter lacks the site, it is the straight line.

    Args:
        vectors: two l, [width] each.
        weights: (1 - t, t); with a t outside of [0, 1] the arc goes on.

    Returns:
        float32 [width].

    Raises:
        ValueError: they are opposite, so that every way round is as short.
    """
    one, other = task_vectors(vectors)
    lengths = one.norm(), other.norm()
    if not all(lengths):
        return as_vector(weighted_total((one, other), weights))
    a, b = one / lengths[0], other / lengths[1]
    # Kahan's: exact for small angles and for those near π, where the arc cosine of a product is not.
    angle = 2.0 * math.atan2(float(torch.linalg.vector_norm(a - b)), float(torch.linalg.vector_norm(a + b)))
    if angle < _PARALLEL:
        return as_vector(weighted_total((one, other), weights))
    if angle > math.pi - _PARALLEL:
        raise ValueError("the two changes are opposite, so that no arc between them is the shortest: use 'delta'")
    arcs = [math.sin(weight * angle) / math.sin(angle) for weight in weights]
    return as_vector(weighted_total((one, other), arcs))
