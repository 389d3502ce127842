"""Two processes that share each layer: every vector is cut as the layer's weights are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from server import Server, say
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from truth import Truth

# SmolLM2's nine heads do not divide by two. Biases, as they are scaled too, and on one process only.
CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    made = LlamaForCausalLM(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow  # the servers' processes wait for each other by spinning
def test_two_processes(small, tmp_path) -> None:
    truth = Truth(small, tmp_path / "adapters")
    names = ["a", "b"]
    for seed, name in enumerate(names):
        truth.make_adapter(name, seed)
    options = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--tensor-parallel-size", "2"]
    options += ["--enable-lora", "--max-lora-rank", "1", "--lora-modules"]
    options += [f"{name}={truth.folder / name}" for name in names]
    server = Server(small, options, tmp_path)
    server.start()
    try:
        server.wait()
        answers = {
            name: [say(server, name, prompt) for prompt in truth.prompts.tolist()] for name in ("a", "b", "a*b", "base")
        }
    finally:
        server.kill()
    assert len({str(tokens) for tokens in answers.values()}) == len(answers)
    for name, tokens in answers.items():
        assert tokens == truth.greedy(tokens, *([] if name == "base" else name.split("*"))), name
