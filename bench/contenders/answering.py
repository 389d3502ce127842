"""Reading a document, and answering over prompts that begin with it: with the cache of what they share, or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ia3rt.bench.contenders.subject import cache_argument


def read(model: Any, document: Tensor) -> Any:
    """The cache of a document that a model has read."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=document, logits_to_keep=1, use_cache=True, **{cache_argument(): cache})
    return cache


def answer(model: Any, prompts: Tensor, tokens: int, cache: Any = None) -> Tensor:
    """The logits of the first token of greedy answers [rows, vocabulary]; a cache is gone on with."""
    options: dict[str, Any] = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    if cache is not None:
        options[cache_argument()] = cache
    made = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    logits: Tensor = made.logits[0]
    return logits
