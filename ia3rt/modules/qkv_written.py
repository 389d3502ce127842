"""Forwards of attentions as transformers writes them, and the same with vectors: of Llama, Mistral, Qwen2 and Phi-3.

Dozens of others are written as one of these. They differ in few words, and in the cache's name from version to version.
"""
# The forwards are written as transformers writes them, without types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# The compiler calls methods of what is imported in another way, so it has to see that this is; nothing is loaded.
_FORWARD = """
if False:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def forward(self, hidden_states, position_embeddings{default}, attention_mask{default}, {cache}=None, **kwargs):
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.head_dim)
{projected}
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
        scaling=self.scaling,
        {window}
        **kwargs,
    )

    attn_output = attn_output.reshape(*input_shape, -1).contiguous()
    attn_output = self.o_proj(attn_output)
    return attn_output, attn_weights
"""
IN_THREE = """
    query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
"""
IN_ONE = """
    qkv = self.qkv_proj(hidden_states)
    query_pos = self.config.num_attention_heads * self.head_dim
    query_states = qkv[..., :query_pos]
    key_states = qkv[..., query_pos : query_pos + self.num_key_value_heads * self.head_dim]
    value_states = qkv[..., query_pos + self.num_key_value_heads * self.head_dim :]

    query_states = query_states.view(hidden_shape).transpose(1, 2)
    key_states = key_states.view(hidden_shape).transpose(1, 2)
    value_states = value_states.view(hidden_shape).transpose(1, 2)
"""


class Manner(NamedTuple):
    """Whose words a forward is written in.

    Attributes:
        default: of its arguments.
        window: the line that gives the attention a sliding window.
        given: the same, of an attention.
    """

    default: str
    window: str
    given: Callable[[Any], dict[str, Any]]


LLAMA = Manner("=None", "", lambda attention: {})
MISTRAL = Manner(
    "",
    'sliding_window=getattr(self.config, "sliding_window", None),',
    lambda attention: {"sliding_window": getattr(attention.config, "sliding_window", None)},
)
QWEN2 = Manner(
    "", "sliding_window=self.sliding_window,", lambda attention: {"sliding_window": attention.sliding_window}
)
_CACHES = (("cache", ", kwargs=kwargs"), ("past_key_values", ""))
"""The cache's name and what it is told beside keys and values: now, and in transformers 5.17 and before."""


def forwards(projected: str, *manners: Manner) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Each forward as its source is written, to be compared with others, and the same with the vectors.

    Args:
        projected: how q, k and v are made.
        manners: whose.
    """
    for manner in manners:
        for cache, told in _CACHES:
            scope: dict[str, Any] = {}
            words = dict(default=manner.default, window=manner.window, projected=projected, cache=cache, told=told)
            exec(_FORWARD.format(**words), scope)
            yield scope["forward"], _worn(manner, bool(told))


def _worn(manner: Manner, tells: bool) -> Callable[..., Any]:
    def forward(
        self,
        worn,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache  # its earlier name, which transformers still takes
        query, key, value = self.ia3_rotated(worn, hidden_states, position_embeddings)
        if cache is not None:
            more = {"kwargs": kwargs} if tells else {}
            key, value = cache.update(key, value, self.layer_idx, **more)
        output, weights = self.ia3_attend(query, key, value, attention_mask, **manner.given(self), **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    return forward
