"""Models that see images beside text, and their adapters."""

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SEEN = dict(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
"""What is adapted in the part that sees, too."""
PICTURE = 98
"""The token that stands for a piece of an image."""


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(7))


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZE, image_size=16, patch_size=8),
        text_config=LlamaConfig(**SIZE, vocab_size=99, pad_token_id=0),
        image_token_index=PICTURE,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def clip() -> CLIPModel:
    size = dict(**SIZE, projection_dim=16)
    text = dict(**size, vocab_size=99, max_position_embeddings=20, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=dict(**size, image_size=16, patch_size=8)))
