"""TIES and DARE with TIES: prune, elect a sign, and average what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ia3rt.adapters.combining.pruning import keep_largest, keep_random
from ia3rt.adapters.combining.task_vectors import as_vector, task_vectors, total, weighted_total

MajoritySignMethod: TypeAlias = Literal["total", "frequency"]


def ties(
    vectors: Sequence[Tensor], weights: Sequence[float], density: float, majority_sign_method: MajoritySignMethod
) -> Tensor:
    """l = 1 + (Σ_{j in A} w_j τ̂_j) / |A|, A being the adapters whose τ̂_j has the elected sign; element by element.

    TIES (Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", algorithm 1), as PEFT's `ties`:
    τ̂ is τ = l - 1 trimmed by `keep_largest`. The elected sign is that of Σ τ̂_j (`total`, the paper's) or of Σ
    sign(τ̂_j) (`frequency`), + where that is 0; weights have no part in it. They are the paper's λ, one an adapter, and
    the sum is divided by the number of adapters that agree, not by their weights. Zeros do not agree with anything.

    Args:
        vectors: l, [width] each.
        weights: one each.
        density: the share of each vector's numbers that stays, in (0, 1].
        majority_sign_method: how the sign is elected.

    Returns:
        float32 [width].

    Raises:
        ValueError: as `keep_largest`.
    """
    pruned = [keep_largest(change, density) for change in task_vectors(vectors)]
    return _merge_what_agrees(pruned, weights, majority_sign_method)


def dare_ties(
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    majority_sign_method: MajoritySignMethod,
    keys: Sequence[str],
) -> Tensor:
    """As `ties`, with τ̂ = τ pruned at random and rescaled (`keep_random`) in the place of the trimmed one.

    DARE (Yu et al. 2024, "Language Models are Super Mario", section 3.3) in front of TIES, as PEFT's `dare_ties`.

    Args:
        vectors: l, [width] each.
        weights: one each.
        density: the probability of each number to stay, in (0, 1].
        majority_sign_method: how the sign is elected.
        keys: what each draw depends on.

    Returns:
        float32 [width].
    """
    changes = zip(task_vectors(vectors), keys, strict=True)
    pruned = [keep_random(change, density, key) for change, key in changes]
    return _merge_what_agrees(pruned, weights, majority_sign_method)


def _merge_what_agrees(pruned: Sequence[Tensor], weights: Sequence[float], method: MajoritySignMethod) -> Tensor:
    votes = total(pruned if method == "total" else [change.sign() for change in pruned])
    elected = torch.where(votes >= 0, 1.0, -1.0)
    agrees = [(change.sign() == elected).double() for change in pruned]
    merged = weighted_total([change * mask for change, mask in zip(pruned, agrees, strict=True)], weights)
    return as_vector(merged / total(agrees).clamp(min=1.0))
