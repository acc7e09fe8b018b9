"""Small denoisers whose samples are no images, as torch's exporter writes them: tokens, audio, video."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mezzotint.compiler.frontend.torch_example import quiet_exporter

WIDTH, HEADS, TOKENS = 32, 4, 12


@dataclass(frozen=True)
class Kind:
    """A network with an example of its sample; `still_open` are axes of the sample that its file leaves open."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    channel_axis: int
    still_open: tuple[int, ...] = ()
    size: tuple[int, ...] | None = None


def time_waves(timestep: torch.Tensor) -> torch.Tensor:
    angles = timestep.float()[:, None] * torch.exp(-torch.arange(WIDTH // 2) * (9.2 / (WIDTH // 2)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TokenBlock(nn.Module):
    """Attention and an MLP behind norms that the timestep modulates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(time)[:, None].chunk(2, dim=-1)
        parts = self.qkv(self.first(x) * (1 + scale) + shift).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        moved: torch.Tensor = x + self.narrow(functional.gelu(self.wide(self.second(x))))
        return moved


class TokenNet(nn.Module):
    """Tokens `[B, N, C]` -> the same: a transformer of two blocks."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(channels, WIDTH), nn.Linear(WIDTH, channels)
        self.time, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.places = nn.Parameter(0.2 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(TokenBlock() for _ in range(2))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = functional.silu(self.time(time_waves(timestep)))
        x = self.embed(hidden_states) + self.places
        for block in self.blocks:
            x = block(x, time)
        predicted: torch.Tensor = self.out(self.norm(x))
        return predicted


class VideoBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.time = nn.Linear(WIDTH, channels)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(functional.silu(self.first(x))) + self.time(time)[:, :, None, None, None]
        moved: torch.Tensor = x + self.conv2(functional.silu(self.second(inner)))
        return moved


class VideoNet(nn.Module):
    """Video `[B, C, T, H, W]` -> the same: 3-D convolutions at two sizes, with a concatenated shortcut."""

    def __init__(self, channels: int = 4, width: int = 16) -> None:
        super().__init__()
        self.embed, self.out = nn.Conv3d(channels, width, 3, padding=1), nn.Conv3d(width, channels, 3, padding=1)
        self.down = nn.Conv3d(width, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.up, self.join = nn.Conv3d(width, width, 3, padding=1), nn.Conv3d(2 * width, width, 1)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(VideoBlock(width) for _ in range(3))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = functional.silu(self.time(time_waves(timestep)))
        x = self.blocks[0](self.embed(sample), time)
        inner = self.blocks[1](self.down(x), time)
        wide = functional.interpolate(inner, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        x = self.join(torch.cat([self.up(wide), x], dim=1))
        predicted: torch.Tensor = self.out(self.blocks[2](x, time))
        return predicted


class AudioNet(nn.Module):
    """Audio `[B, C, L]` -> the same: a small UNet1DModel of diffusers."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        from diffusers import UNet1DModel

        self.model = UNet1DModel(
            sample_size=16,
            in_channels=channels,
            out_channels=channels,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            flip_sin_to_cos=False,
            freq_shift=1,
            down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
            up_block_types=("UpResnetBlock1D",),
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
            block_out_channels=(16, 32),
            act_fn="swish",
            layers_per_block=1,
        )

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        return self.model(sample, timestep, return_dict=False)[0]


KINDS = {
    "tokens": Kind(TokenNet, (TOKENS, 6), 2),
    "audio": Kind(AudioNet, (6, 16), 1, still_open=(2,), size=(16,)),
    "video": Kind(VideoNet, (4, 3, 8, 8), 1, still_open=(2, 3, 4), size=(3, 8, 8)),
}


def write_rank(kind: Kind, file: Path) -> nn.Module:
    """Write the ONNX file of a network with random weights; return the network."""
    torch.manual_seed(0)
    module = kind.make().eval()
    names = ["hidden_states" if kind.channel_axis > 1 else "sample", "timestep"]
    axes = {0: "batch", **{axis: f"side_{axis}" for axis in kind.still_open}}
    example = (torch.randn(2, *kind.shape), torch.tensor([5, 5]))
    with torch.no_grad(), warnings.catch_warnings(), quiet_exporter():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            str(file),
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["out"],
            dynamic_axes={names[0]: axes, "timestep": {0: "batch"}, "out": axes},
        )
    return module
