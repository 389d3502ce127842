"""Attentions whose forward is known: projections of q, k and v, or one for the three, and a rotary embedding behind."""
# The forwards are written as transformers writes them, without types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ia3rt.modules.qkv_written import IN_ONE, IN_THREE, LLAMA, MISTRAL, QWEN2, forwards
from ia3rt.modules.same_code import same_function
from ia3rt.modules.wearer import original_class

# The forwards below are only compared with others, which find these names in their own modules.
if TYPE_CHECKING:  # the compiler calls methods of what is imported in another way
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
apply_rotary_pos_emb: Any = None
eager_attention_forward: Any = None


class Form(NamedTuple):
    """How an attention computes.

    Attributes:
        forward: the forward, as its source is written; a class is of this form if its own compiles to the same.
        rotary: the rotary embedding that the forward calls, likewise; pairs are half of rotary_dim apart.
        projections: the names of the projections of q, k and v, or of their one projection.
        sizes: what `parts` has to know of an attention.
        parts: (an output of each projection [..., width], *sizes) to q, k and v, views [..., heads, D]; so are vectors
            taken apart, of which there may be none.
        worn: (the attention, what its rows wear, what the forward is given): the forward with the vectors, which scale
            the projections' outputs.
        is_partial: whether some of a head's numbers may not be rotated.
    """

    forward: Callable[..., Any]
    rotary: Callable[..., Any]
    projections: tuple[str, ...]
    sizes: Callable[[Any], tuple[int, ...]]
    parts: Callable[..., tuple[Any, ...]]
    worn: Callable[..., Any]
    is_partial: bool


def rotate_half(x):  # noqa: D103
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def _rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def _rotary_in_one(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)

    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]

    q_embed = torch.cat([(q_rot * cos) + (rotate_half(q_rot) * sin), q_pass], dim=-1)
    k_embed = torch.cat([(k_rot * cos) + (rotate_half(k_rot) * sin), k_pass], dim=-1)
    return q_embed, k_embed


def _rotary_in_two(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)

    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]

    q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)
    k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)

    q_embed = torch.cat([q_embed, q_pass], dim=-1)
    k_embed = torch.cat([k_embed, k_pass], dim=-1)
    return q_embed, k_embed


def _head_dim(attention: Any) -> tuple[int, ...]:
    return (attention.head_dim,)


def _by_heads(q: Tensor | None, k: Tensor | None, v: Tensor | None, head_dim: int) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))


def _phi3_sizes(attention: Any) -> tuple[int, ...]:
    return attention.config.num_attention_heads, attention.num_key_value_heads, attention.head_dim


def _phi3_parts(qkv: Tensor, heads: int, heads_kv: int, head_dim: int) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = qkv.unflatten(-1, (-1, head_dim)).split((heads, heads_kv, heads_kv), -2)
    return parts


def _gpt_neox(self, hidden_states, attention_mask, layer_past=None, position_embeddings=None, **kwargs):
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, 3 * self.head_size)

    qkv = self.query_key_value(hidden_states).view(hidden_shape).transpose(1, 2)
    query_states, key_states, value_states = qkv.chunk(3, dim=-1)

    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

    if layer_past is not None:
        key_states, value_states = layer_past.update(key_states, value_states, self.layer_idx)

    attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )

    attn_output, attn_weights = attention_interface(
        self,
        query_states,
        key_states,
        value_states,
        attention_mask,
        scaling=self.scaling,
        dropout=0.0 if not self.training else self.attention_dropout,
        **kwargs,
    )

    attn_output = attn_output.reshape(*input_shape, -1).contiguous()
    attn_output = self.dense(attn_output)

    return attn_output, attn_weights


def _gpt_neox_worn(self, worn, hidden_states, attention_mask, layer_past=None, position_embeddings=None, **kwargs):
    query, key, value = self.ia3_rotated(worn, hidden_states, position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    output, weights = self.ia3_attend(query, key, value, attention_mask, **kwargs)
    return self.dense(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def _gpt_neox_sizes(attention: Any) -> tuple[int, ...]:
    return (attention.head_size,)


def _gpt_neox_parts(qkv: Tensor, head_size: int) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = qkv.unflatten(-1, (-1, 3, head_size)).unbind(-2)
    return parts


FORMS: tuple[Form, ...] = (
    *(
        Form(forward, _rotary, ("q_proj", "k_proj", "v_proj"), _head_dim, _by_heads, worn, False)
        for forward, worn in forwards(IN_THREE, LLAMA, MISTRAL, QWEN2)
    ),
    *(
        Form(forward, _rotary_in_one, ("qkv_proj",), _phi3_sizes, _phi3_parts, worn, True)
        for forward, worn in forwards(IN_ONE, MISTRAL)
    ),
    Form(_gpt_neox, _rotary_in_two, ("query_key_value",), _gpt_neox_sizes, _gpt_neox_parts, _gpt_neox_worn, True),
)


def form_of(attention: nn.Module) -> Form | None:
    """The form whose forward, and what it calls, compile to the same: by what it computes, not by a class's name."""
    return form_of_class(original_class(type(attention)))


def form_of_class(cls: type) -> Form | None:
    """The form of a class's attentions."""
    forward = original_forward(cls)
    if forward is None:
        return None
    rotary: Any = forward.__globals__.get("apply_rotary_pos_emb")
    for form in FORMS:
        if same_function(forward, form.forward) and same_function(rotary, form.rotary):
            return form if same_function(rotary.__globals__.get("rotate_half"), rotate_half) else None
    return None


def original_forward(cls: type) -> FunctionType | None:
    """A class's forward, without transformers' decorator for arguments that were renamed; None where it is another's.

    It is one that finds its global names in the module that it says it is from.
    """
    forward: Any = cls.forward  # type: ignore[attr-defined]
    inner = getattr(forward, "__wrapped__", None)
    if inner is not None:
        renames = forward.__globals__.get("__name__") == "transformers.utils.deprecation"
        forward = inner if renames else None
    if not isinstance(forward, FunctionType) or getattr(forward, "__wrapped__", None) is not None:
        return None
    module = sys.modules.get(forward.__module__)
    return forward if module is not None and vars(module) is forward.__globals__ else None
