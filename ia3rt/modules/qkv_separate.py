"""Attentions with a projection each for q, k and v, as Llama, Mistral, Qwen2 and those after them write it."""
# The forwards are written as transformers writes them, without types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

PROJECTIONS = ("q_proj", "k_proj", "v_proj")

# The words that differ: in the arguments, in the cache's name and what it is told, and in the attention's arguments.
# The compiler calls methods of what is imported in another way, so it has to see that this is; nothing is loaded.
_FORWARD = """
if False:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def forward(self, hidden_states, position_embeddings{default}, attention_mask{default}, {cache}=None, **kwargs):
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.head_dim)

    query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

    if {cache} is not None:
        key_states, value_states = {cache}.update(key_states, value_states, self.layer_idx{told})

    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )

    attn_output, attn_weights = attention_interface(
        self,
        query_states,
        key_states,
        value_states,
        attention_mask,
        dropout=0.0 if not self.training else self.attention_dropout,
        scaling=self.scaling,{window}
        **kwargs,
    )

    attn_output = attn_output.reshape(*input_shape, -1).contiguous()
    attn_output = self.o_proj(attn_output)
    return attn_output, attn_weights
"""
_OF_CONFIG = 'sliding_window=getattr(self.config, "sliding_window", None),'
_OF_LAYER = "sliding_window=self.sliding_window,"
_ARGUMENTS: tuple[tuple[str, str, Callable[[Any], dict[str, Any]]], ...] = (
    ("=None", "", lambda attention: {}),
    ("", _OF_CONFIG, lambda attention: {"sliding_window": getattr(attention.config, "sliding_window", None)}),
    ("", _OF_LAYER, lambda attention: {"sliding_window": attention.sliding_window}),
)
"""Of Llama, of Mistral, and of Qwen2: what the arguments' default is, and what the attention is given beside them."""
_CACHES = (("cache", ", kwargs=kwargs"), ("past_key_values", ""))
"""The cache's name and what it is told beside keys and values, from transformers 5.2x on and before."""


def forwards() -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Each forward as its source is written, to be compared with others, and the same with the vectors."""
    for default, window, given in _ARGUMENTS:
        for cache, told in _CACHES:
            scope: dict[str, Any] = {}
            exec(_FORWARD.format(default=default, window=window, cache=cache, told=told), scope)
            yield scope["forward"], _worn(given, bool(told))


def _worn(given: Callable[[Any], dict[str, Any]], tells: bool) -> Callable[..., Any]:
    def worn(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, past_key_values=None, **kwargs
    ):
        cache = past_key_values if cache is None else cache  # its earlier name, which transformers still takes
        query, key, value = self.ia3_rotated(hidden_states, position_embeddings)
        if cache is not None:
            more = {"kwargs": kwargs} if tells else {}
            key, value = cache.update(key, value, self.layer_idx, **more)
        output, weights = self.ia3_attend(query, key, value, attention_mask, **given(self), **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    return worn


def sizes(attention: Any) -> tuple[int, ...]:
    """What `parts` has to know."""
    return (attention.head_dim,)


def parts(q: Tensor | None, k: Tensor | None, v: Tensor | None, head_dim: int) -> tuple[Tensor | None, ...]:
    """Each by heads: [..., heads, head_dim]. As vectors are laid out, there may be none."""
    return tuple(None if x is None else x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
