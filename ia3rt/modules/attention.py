"""The attention implementation "ia3rt" of transformers: `model.set_attn_implementation("ia3rt")`.

The vectors of a patched model stay where they were: l_k and l_v act on their projections' outputs. A cache then holds
what each token's own mix made of it, and a sequence may change its mix and keep its past. So no vectors are passed on
from here; those of ops.attention are for callers whose keys and values are not kept.

transformers is not imported until `register` is called.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ia3rt import ops, reference
from ia3rt.adapters.outside_modes import outside_modes
from ia3rt.routing.tables import MixTables

NAME = "ia3rt"


def register() -> None:
    """Make transformers know the attention implementation "ia3rt", for models made before and after.

    Raises:
        ImportError: transformers is not installed, or older than its registry of attention functions.

    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # It marks the function. Not as a decorator: that would import torch's compiler, and Triton, with ia3rt.
    torch.compiler.assume_constant_result(_backend)  # type: ignore[no-untyped-call]
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return (o [B, Sq, Hq, D], None): what transformers asks of an attention implementation.

    Args:
        module: the attention layer, whose `is_causal` counts where the argument is None.
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        value: [B, Hkv, Skv, D].
        attention_mask: as sdpa_mask makes it: bool or additive, [B, 1, Sq, Skv]; or None.
        dropout: 0.
        scaling: of the scores; 1/√D where None.
        is_causal: whether the mask is causal, where attention_mask is None.
        sliding_window: how many keys back a query sees, where attention_mask is None; a mask has it in it.
        softcap: caps the scores.
        kwargs: what else transformers passes; `position_bias`, `s_aux` and `output_attentions` have to be absent.

    Raises:
        ValueError: the model asks for something that flash attention does not do.

    """
    unsupported = [
        name for name in ("position_bias", "s_aux", "output_attentions", "head_mask") if _given(kwargs, name)
    ]
    if dropout > 0:
        unsupported.append("dropout")
    if unsupported:
        raise ValueError(
            f"the attention implementation {NAME!r} has no {', '.join(unsupported)}: use 'eager' for it, or set it to 0"
        )
    # As transformers' sdpa: one query needs no causal mask, and without a mask an empty static cache is cut off.
    length = query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = length > 1 and attention_mask is None and causal
    if causal and key.shape[2] > length:
        key, value = key[:, :, :length], value[:, :, :length]
    window = sliding_window if causal and sliding_window is not None and sliding_window < length else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    fits = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1] <= 256
    # Beside a tensor that has no numbers, tables that are kept would have some.
    if fits and type(query) is Tensor and not torch.compiler.is_compiling() and ops.backend(query) == "triton":
        given = (query, key, value) if attention_mask is None else (query, key, value, attention_mask)
        prepared = _prepared(len(given) == 4, scale, causal, window, softcap)
        return prepared.call(_unread(query.device), *given)[0], None
    unread = torch.empty(1, 2, dtype=torch.int32, device=query.device)  # a mix table, and a route to it
    arguments = query, key, value, attention_mask, *(None,) * 4, unread, unread[0, :1], scale, causal, window, softcap
    if fits and _backend(query.device.type, query.dtype) == "triton":
        return ops.attention(*arguments)[0], None
    if softcap is not None or window is not None or ops.needs_torch():  # torch's has no derivative forwards
        return reference.attention(*arguments)[0], None
    o = F.scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return o.transpose(1, 2).contiguous(), None


@functools.lru_cache(256)
def _prepared(masked: bool, scale: float, causal: bool, window: int | None, softcap: float | None) -> ops.Bound:
    """The op without vectors, and without a mask where there is none."""
    absent = dict.fromkeys(["ranges", "table", "l_k", "l_v"] if masked else ["mask", "ranges", "table", "l_k", "l_v"])
    return ops.Bound(ops.attention, **absent, scale=scale, causal=causal, window=window, softcap=softcap)


@functools.cache
@outside_modes
def _unread(device: torch.device) -> MixTables:
    """Tables for an op that has no vector to scale."""
    tables = MixTables()
    tables.mixes, tables.route = (torch.zeros(size, dtype=torch.int32, device=device) for size in ((1, 2), (1,)))
    return tables


def _given(kwargs: dict[str, Any], name: str) -> bool:
    return kwargs.get(name) is not None and kwargs[name] is not False


def _backend(device: str, dtype: torch.dtype) -> str:
    """Return what computes, by a function that torch.compile does not look into."""
    return ops.backend(torch.empty(0, dtype=dtype, device=device))
