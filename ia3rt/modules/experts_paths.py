"""How experts compute with vectors, path by path: as without them, and scaled where a vector acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ia3rt.modules import eager
from ia3rt.modules.experts_forms import interface_of
from ia3rt.modules.wearer import original_class

_PIECE = 1 << 18  # numbers: larger copies of scales are not kept on a CPU, as in eager.py


class Scales(NamedTuple):
    """The vectors of one matrix of all experts.

    Attributes:
        table: float32 [n, experts, width], n different ones.
        rows: which of them each token wears, int64 [tokens]; None where all wear the first.
    """

    table: Tensor
    rows: Tensor | None

    def of_expert(self, h: Tensor, expert: Tensor, token: Tensor) -> Tensor:
        """The scaled h, [k, width], of these k tokens in one expert."""
        return eager.scaled(h, self.table[0, expert] if self.rows is None else self.table[self.rows[token], expert])

    def of_pairs(self, h: Tensor, expert: Tensor, token: Tensor) -> Tensor:
        """The scaled h, [k, width], of k pairs of a token and an expert."""
        number = expert if self.rows is None else self.rows[token] * self.table.shape[1] + expert
        table = self.table.flatten(0, 1)
        pairs = max(1, _PIECE // h.shape[-1])
        whole = h.is_cuda or len(h) <= pairs or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if whole:
            return eager.scaled(h, table[number])
        y = torch.empty_like(h)
        for start in range(0, len(h), pairs):
            piece = slice(start, start + pairs)
            torch.mul(h[piece], table[number[piece]], out=y[piece])
        return y

    def of_all(self, h: Tensor) -> Tensor:
        """The scaled h, [experts, tokens, width], where each token is in each expert."""
        table = self.table[0].unsqueeze(1) if self.rows is None else self.table[self.rows].transpose(0, 1)
        return eager.scaled(h, table)


class Acting(NamedTuple):
    """What acts in a module of experts: at the first matrix's output, and at the second one's input."""

    up: Scales | None
    down: Scales | None


class _Pairs:
    """Experts as transformers' functions see them, for one call: those ask it for what is between the matrices."""

    def __init__(self, experts: Any, acting: Acting, expert: Tensor, token: Tensor) -> None:
        self._experts = experts
        self._acting = acting
        self._pairs = expert, token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def _apply_gate(self, h: Tensor) -> Tensor:
        up, down = self._acting
        h = h if up is None else up.of_pairs(h, *self._pairs)
        h = _activated(self._experts, h)
        return h if down is None else down.of_pairs(h, *self._pairs)

    act_fn = _apply_gate  # what they ask for where there is no gate


def by_implementation(experts: Any, acting: Acting, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """By the function of transformers that the model's config names.

    Args:
        experts: the module.
        acting: what acts.
        x: [tokens, features].
        index: integer [tokens, k], the experts of each token.
        weights: [tokens, k], what their results are multiplied by.
    """
    name = experts.config._experts_implementation
    if name in (None, "eager"):
        return by_expert(experts, acting, x, index, weights)
    expert = index.reshape(-1)
    token = torch.arange(len(expert), device=expert.device)
    if name == "grouped_mm":  # pairs in the order in which it computes them: the same numbers sort in the same way
        expert, token = torch.sort(expert)
    pairs = _Pairs(experts, acting, expert, token // index.shape[-1])
    return interface_of(original_class(type(experts)))[name](pairs, x, index, weights)  # type: ignore[no-any-return]


def by_expert(experts: Any, acting: Acting, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """One expert after another, as in the forward of a class of experts. Arguments as `by_implementation`."""

    def compute(h: Tensor, expert: Tensor, token: Tensor) -> Tensor:
        up, down = acting
        h = _linear(experts, "gate_up_proj" if experts.has_gate else "up_proj", h, expert)
        h = h if up is None else up.of_expert(h, expert, token)
        h = _activated(experts, h)
        h = _linear(experts, "down_proj", h if down is None else down.of_expert(h, expert, token), expert)
        normalises = getattr(experts, "has_post_expert_norm", False)  # which transformers 5.17 does not have yet
        return experts.post_expert_norm(h) if normalises else h

    return _looped(experts.num_experts, compute, x, index, weights)


def flat(experts: Any, acting: Acting, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The same where the matrices lie below each other in one, and the second is transposed (DBRX).

    Arguments as `by_implementation`, with x [rows, tokens of a row, features].
    """
    mlp, down = experts.mlp, acting.down
    w1, v1, w2 = (each.view(experts.num_experts, -1, x.shape[-1]) for each in (mlp.w1, mlp.v1, mlp.w2))

    def compute(h: Tensor, expert: Tensor, token: Tensor) -> Tensor:
        h = mlp.activation_fn(h.matmul(w1[expert].T)) * h.matmul(v1[expert].T)
        return (h if down is None else down.of_expert(h, expert, token)).matmul(w2[expert])

    y = _looped(experts.num_experts, compute, x.reshape(-1, x.shape[-1]), index, weights)
    return y.view(x.shape[0], -1, x.shape[-1])


def sorted_by_expert(experts: Any, acting: Acting, x: Tensor) -> Tensor:
    """Each token in each expert (Llama 4).

    Args:
        experts: the module.
        acting: what acts.
        x: [experts * tokens, features].
    """
    up, down = acting
    h = torch.bmm(x.view(len(experts.gate_up_proj), -1, x.shape[-1]), experts.gate_up_proj)
    gate, other = (h if up is None else up.of_all(h)).chunk(2, dim=-1)
    h = other * experts.act_fn(gate)
    return torch.bmm(h if down is None else down.of_all(h), experts.down_proj).view(-1, x.shape[-1])


def _looped(
    count: int, compute: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Σ over the experts of a token, weights ∘ compute(the tokens of an expert, which one, which tokens)."""
    y = torch.zeros_like(x)
    with torch.no_grad():
        chosen = F.one_hot(index, count + 1).permute(2, 1, 0)  # [experts, k, tokens]
        hit = chosen[:count].sum((1, 2)).nonzero()
    for (expert,) in hit:
        place, token = torch.where(chosen[expert])
        part = compute(x[token], expert, token) * weights[token, place, None]
        y.index_add_(0, token, part.to(y.dtype))
    return y


def _linear(experts: Any, name: str, h: Tensor, expert: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias: Tensor | None = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    if not experts.is_transposed:
        return F.linear(h, weight, bias)
    y: Tensor = h @ weight
    return y if bias is None else y + bias


def _activated(experts: Any, h: Tensor) -> Tensor:
    activated: Tensor = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    return activated
