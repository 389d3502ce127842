"""Tiny mixtures of experts with random weights, and the truth for vectors of their experts."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from tiny import VOCABULARY
from torch import Tensor, nn
from transformers import PreTrainedModel

_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_FEW = dict(num_local_experts=4, num_experts_per_tok=2)
_SMALL = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

# By model type: the model's class, and what its config says beside the sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", _FEW),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**_SMALL, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_SMALL, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", _SMALL),
    "granitemoe": ("GraniteMoeForCausalLM", _FEW),
    "phimoe": ("PhimoeForCausalLM", {**_FEW, "router_jitter_noise": 0.01}),
    "gpt_oss": ("GptOssForCausalLM", {**_FEW, "head_dim": 8, "sliding_window": 16}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        dict(
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        {**_FEW, "intermediate_size_mlp": 24, "head_dim": 8, "interleave_moe_layer_step": 1, "moe_layers": [0, 1]},
    ),
    "dbrx": (
        "DbrxForCausalLM",
        dict(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=128,
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
            ffn_config=dict(hidden_size=32, ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
        ),
    ),
}


def tiny_mixture(family: str = "mixtral", dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A two-layer model, the same at each call, whose experts differ much."""
    name, own = FAMILIES[family]
    cls = getattr(importlib.import_module("transformers"), name)
    torch.manual_seed(0)
    model: PreTrainedModel = cls(cls.config_class(**{**_SIZES, **own, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def random_vectors(runtime: Any, seed: int) -> dict[tuple[str, str], Tensor]:
    """A vector for each site, some of its numbers zero."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {}
    for site in runtime.sites:
        values = torch.empty(site.width).uniform_(-0.5, 2.0, generator=generator)
        vectors[site.key] = values.masked_fill(torch.rand(site.width, generator=generator) < 0.05, 0.0)
    return vectors


def scaled_mixture(model: nn.Module, vectors: dict[tuple[str, str], Tensor]) -> nn.Module:
    """The truth: a float64 copy of `model`, the vectors multiplied into its weights by hand, expert by expert."""
    copied: Any = copy.deepcopy(model).double()
    if copied._can_set_experts_implementation():
        copied.set_experts_implementation("eager")  # torch's grouped matrices are not computed in float64
    for (path, side), vector in vectors.items():
        parent, _, name = path.rpartition(".")
        holder, vector = copied.get_submodule(parent), vector.double().to(copied.device)
        weight = getattr(holder, name)
        if isinstance(weight, nn.Module):
            weight.weight.data *= vector if side == "in" else vector.unsqueeze(1)
            if side == "out" and weight.bias is not None:
                weight.bias.data *= vector
        elif name == "w2":  # DBRX: all experts' rows below each other
            weight.data *= vector.unsqueeze(1)
        else:
            transposed = weight.shape[1 if side == "in" else 2] * len(weight) == len(vector)
            for expert, own in enumerate(vector.view(len(weight), -1)):
                last = (side == "in") != transposed
                weight.data[expert] *= own if last else own.unsqueeze(1)
                if side == "out" and hasattr(holder, f"{name}_bias"):
                    getattr(holder, f"{name}_bias").data[expert] *= own
    return copied
