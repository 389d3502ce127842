"""A Llama of two layers, saved as vLLM reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def save_small_model(folder: Path) -> None:
    """Saves it, of random weights in float32, with a tokenizer of bytes, which gives each token a letter of its own."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
