"""Tiny models with random weights, IA³ adapters for them, and an independent truth to compare with."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import ia3rt

VOCABULARY = 128
TARGETS = {
    "llama": dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "gpt2": dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
}
FAMILIES = list(TARGETS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer model whose biases are not zero, the same at each call."""
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            mlp_bias=True,
        )
        model: PreTrainedModel = LlamaForCausalLM(config)
    else:
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=4)
        model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def token_ids(rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def patched(model: nn.Module, names: str = "ab", seed: int = 3, **options: object) -> ia3rt.Runtime:
    """A patched model with an adapter for each letter, whose vectors are random numbers from 0.5 to 1.5."""
    runtime = ia3rt.patch(model.eval(), **options)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        vectors = {s.key: torch.rand(s.width, generator=generator, device="cpu") + 0.5 for s in runtime.sites}
        runtime.add_adapter(name, vectors)
    return runtime


def peft_model(model: nn.Module, family: str, names: str = "bcd", **config: object) -> peft.PeftModel:
    """A PEFT model over a copy of `model`, with adapters whose vectors are random, some of their numbers zero."""
    configs = {name: peft.IA3Config(**{**TARGETS[family], **config}, task_type="CAUSAL_LM") for name in names}
    wrapped = peft.get_peft_model(copy.deepcopy(model), configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, configs[name])
    randomize(wrapped, seed=2)
    return wrapped.eval()


def randomize(wrapped: peft.PeftModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "ia3_l" in name:
            values = torch.empty(parameter.shape).uniform_(-0.5, 2.0, generator=generator)
            values = values.masked_fill(torch.rand(values.shape, generator=generator) < 0.05, 0.0)
            parameter.data = values.to(parameter.device)


def save_each(wrapped: peft.PeftModel, folder: Path) -> list[Path]:
    """Saves each adapter of a PEFT model as a checkpoint of its own: folder/<name>."""
    folders = []
    for name in wrapped.peft_config:
        wrapped.save_pretrained(folder, selected_adapters=[name])
        folders.append(folder if name == "default" else folder / name)
    return folders


def peft_vectors(wrapped: peft.PeftModel, name: str) -> dict[tuple[str, str], Tensor]:
    """An adapter's vectors in float64, by module path and side."""
    return {
        (path, "in" if layer.is_feedforward else "out"): layer.ia3_l[name].detach().double().flatten()
        for path, layer in wrapped.get_base_model().named_modules()
        if hasattr(layer, "ia3_l") and name in layer.ia3_l
    }


def scaled(model: nn.Module, scales: dict[tuple[str, str], Tensor]) -> nn.Module:
    """The truth: a float64 copy of `model` with the scales multiplied into its weights, by the paper's formula."""
    copied = copy.deepcopy(model).double()
    for (path, side), scale in scales.items():
        module = copied.get_submodule(path)
        weight = module.weight.data.t() if type(module).__name__ == "Conv1D" else module.weight.data
        scale = scale.to(weight.device)
        if side == "in":
            weight *= scale
        else:
            weight *= scale.unsqueeze(1)
            if module.bias is not None:
                module.bias.data *= scale
    return copied


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """A model's logits, on the device of `ids` wherever it runs."""
    with torch.no_grad():
        return model(ids.to(model.device)).logits.to(ids.device)


def generated(model: nn.Module, ids: Tensor, mask: Tensor, **settings: object) -> Tensor:
    """What a model generates, on the device of `ids` wherever it runs."""
    there = model.device
    return model.generate(input_ids=ids.to(there), attention_mask=mask.to(there), **settings).to(ids.device)
