"""Tiny models with heads, adapters that bring their own of a module, and PEFT's logits for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCABULARY = 99
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
ENCODER = dict(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])

# How to make a model, and what PEFT's config says besides its task.
KINDS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any], str, dict[str, Any]]] = {
    "a linear head": (LlamaForSequenceClassification, LlamaConfig, {"pad_token_id": 0, "num_labels": 3}, "SEQ_CLS", {}),
    "a head by token": (LlamaForTokenClassification, LlamaConfig, {"num_labels": 3}, "TOKEN_CLS", {}),
    "a head of two layers": (RobertaForSequenceClassification, RobertaConfig, {"num_labels": 3}, "SEQ_CLS", ENCODER),
    "a head for answers": (BertForQuestionAnswering, BertConfig, {}, "QUESTION_ANS", ENCODER),
    "an lm_head": (LlamaForCausalLM, LlamaConfig, {}, "CAUSAL_LM", {"modules_to_save": ["lm_head"]}),
    "a tied lm_head": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True},
        "CAUSAL_LM",
        {"modules_to_save": ["lm_head"]},
    ),
    "embeddings": (LlamaForCausalLM, LlamaConfig, {}, "CAUSAL_LM", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "all norms": (LlamaForCausalLM, LlamaConfig, {}, "CAUSAL_LM", {"modules_to_save": ["norm"]}),
}


def model_of(kind: str) -> PreTrainedModel:
    """The same at each call."""
    cls, config, settings, _, _ = KINDS[kind]
    torch.manual_seed(0)
    return cls(config(**SIZES, **settings)).eval()


def adapted(model: nn.Module, kind: str, seed: int, name: str = "default") -> peft.PeftModel:
    """PEFT's model around `model`, with an adapter whose vectors and own modules are random."""
    _, _, _, task, config = KINDS[kind]
    wrapped = peft.get_peft_model(model, peft.IA3Config(task_type=task, **config), adapter_name=name).eval()
    randomize(wrapped, seed)
    return wrapped


def randomize(wrapped: nn.Module, seed: int) -> None:
    """Other numbers in all that PEFT trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(1, 0.3, generator=generator)


def targets_of(kind: str) -> dict[str, Any]:
    """What patch() needs to be told, where structure does not say it."""
    return ENCODER if KINDS[kind][4] is ENCODER else {}


def token_ids(rows: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(1))


def output(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits, [rows, …]; of answers, those of their starts and ends side by side."""
    with torch.no_grad():
        made = model(input_ids=ids)
    return made.logits if hasattr(made, "logits") else torch.stack([made.start_logits, made.end_logits], dim=1)


def saved(kind: str, folder: Path, seeds: dict[str, int], ids: Tensor) -> dict[str, Tensor]:
    """Saves an adapter a name, folder/<name>, by PEFT; PEFT's outputs for each."""
    outputs = {}
    for name, seed in seeds.items():
        wrapped = adapted(model_of(kind), kind, seed)
        wrapped.save_pretrained(folder / name)
        outputs[name] = output(wrapped, ids)
    return outputs
