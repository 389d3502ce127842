"""Tiny models of diffusers' with random weights, and what IA³ acts at in them."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor, nn

UNET = dict(
    target_modules=["to_k", "to_v", "net.2", "conv1", "conv2", "downsamplers.0.conv", "conv_in"],
    feedforward_modules=["net.2", "conv2"],
)
SD3 = dict(target_modules=["to_k", "to_v", "net.2", "pos_embed.proj"], feedforward_modules=["net.2"])


def unet() -> nn.Module:
    """Attention over text, one block down and one up; the same at each call."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return model.eval()


def sd3() -> nn.Module:
    """Two blocks over image and text; the same at each call."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    return model.eval()


def unet_inputs(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return dict(
        sample=torch.randn(rows, 4, 8, 8, generator=generator),
        timestep=torch.tensor(7),
        encoder_hidden_states=torch.randn(rows, 5, 12, generator=generator),
    )


def sd3_inputs(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(rows, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(rows, 5, 12, generator=generator),
        pooled_projections=torch.randn(rows, 10, generator=generator),
        timestep=torch.full((rows,), 7),
    )


MODELS = {"unet": (unet, unet_inputs, UNET), "sd3": (sd3, sd3_inputs, SD3)}
