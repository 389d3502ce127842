"""What attention keeps of a step that wears adapters is finite, whatever they made of it.

Blocks of the cache go from one request to the next, and attention reads a block to its end, also where a request has
filled only its beginning: it multiplies what the one before left there by a probability of zero. That is zero for any
number, and NaN for NaN and infinity. So one request's overflow would be in everybody's answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention, MLAAttention

from ia3rt.serving.vllm.slots import TokenSlots

LARGEST = 2.0**62
"""Keys and values end here where their dtype does not end before: a product with a query of 2**40, summed over 256
numbers, is far from float32's end at 2**128, so that masked scores are finite too."""


def finite(x: Tensor) -> Tensor:
    """A copy of x without what is not finite: NaN becomes 0, and what is past LARGEST or the dtype's end becomes that.

    Args:
        x: keys or values, any shape, floating.
    """
    end = min(LARGEST, torch.finfo(x.dtype).max)
    return x.nan_to_num(nan=0.0).clamp_(-end, end)


class FiniteAttention:
    """Mixed into vLLM's attention: keys and values of a step in which a slot is worn are made finite.

    Attributes:
        ia3_slots: what the step's tokens wear.
    """

    ia3_slots: TokenSlots

    def forward(self, query: Tensor, key: Tensor | None, value: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """vLLM's forward; of latent attention key and value are the two parts that it keeps.

        Args:
            query: [tokens, …].
            key: [tokens, …], or None where another layer's are read.
            value: the same.
            args: what else the class takes.
            kwargs: the same.
        """
        if torch.compiler.is_compiling() or self.ia3_slots.worn:
            key = None if key is None else finite(key)
            value = None if value is None else finite(value)
        result: Tensor = super().forward(query, key, value, *args, **kwargs)  # type: ignore[misc]
        return result


def keep_finite(model: nn.Module, slots: TokenSlots) -> None:
    """Makes all attention layers of a model ones that keep only finite keys and values.

    All, as an overflow in one layer is in the keys and values of every layer after it, whether an adapter acts there
    or not.

    Args:
        model: vLLM's.
        slots: what a step's tokens wear.
    """
    made: dict[type, type] = {}
    for module in model.modules():
        if isinstance(module, Attention | MLAAttention):
            cls = type(module)
            if cls not in made:
                made[cls] = type(f"Finite{cls.__name__}", (FiniteAttention, cls), {})
            module.__class__ = made[cls]
            module.ia3_slots = slots
