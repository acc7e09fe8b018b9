"""Configurations of published models that the benchmarks build with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def random_model(name: str, config: dict[str, Any], *, normal: bool = False) -> Callable[[], Any]:
    """A factory for a diffusers model with seeded random weights.

    torch draws weights evenly from a range, which no branch of low rank makes narrower. With `normal` they are drawn
    again from normal distributions of the same variances, whose tails are nearer to those of trained weights.
    """
    import diffusers
    import torch

    def build() -> Any:
        torch.manual_seed(0)
        model = getattr(diffusers, name)(**config)
        for weight in model.parameters() if normal else ():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=float(weight.detach().std()))
        return model

    return build
