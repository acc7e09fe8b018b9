"""U-Nets of videos: AnimateDiff and text-to-video on `[B, C, T, H, W]`, Stable Video Diffusion on `[B, T, C, H, W]`."""

from __future__ import annotations

from typing import Any

from .row import PROMPT, PROMPT_LENGTH, Architecture, Asked, Input, NetworkInputs, first
from .video import frames_of

_IMAGE = "image_latents"


def _animated(asked: Asked) -> NetworkInputs:
    config, channels = asked.config, asked.number("in_channels")
    for key in ("addition_embed_type", "encoder_hid_dim_type"):
        if config.get(key) is not None:
            raise asked.error(f"a {asked.name} with {key} {config[key]!r} cannot be exported yet")
    conditions = {PROMPT: Input((asked.tokens(PROMPT, 77), first(config["cross_attention_dim"])), length=PROMPT_LENGTH)}
    if config.get("time_cond_proj_dim") is not None:
        conditions["timestep_cond"] = Input((asked.number("time_cond_proj_dim"),))
    shape = (channels, frames_of(asked, 16), *asked.side(64))
    return NetworkInputs("sample", shape, conditions, None, asked.predicted)


def _stable_video(asked: Asked) -> NetworkInputs:
    """Stable Video Diffusion takes the latents of the noise and those of an image, joined along their channels."""
    config, frames = asked.config, frames_of(asked, asked.number("num_frames"))
    image = asked.number("out_channels")
    height, width = asked.side(96)
    extra = asked.number("in_channels") - image
    conditions = {
        PROMPT: Input((asked.tokens(PROMPT, 1), first(config["cross_attention_dim"]))),  # the one token of an image
        "added_time_ids": Input(
            (asked.number("projection_class_embeddings_input_dim") // asked.number("addition_time_embed_dim"),)
        ),
        _IMAGE: Input((frames, extra, height, width)),
    }
    return NetworkInputs("sample", (frames, image, height, width), conditions, None, image, channel_axis=2)


def _joined(module: Any, arguments: dict[str, Any]) -> Any:
    import torch

    sample, image = arguments.pop("sample"), arguments.pop(_IMAGE)
    return module(torch.cat([sample, image], dim=2), **arguments, return_dict=False)[0]


def _repeated(module: Any, arguments: dict[str, Any]) -> Any:
    """Call AnimateDiff's network, whose pipeline repeats the prompt for each frame."""
    frames = arguments["sample"].shape[2]
    arguments[PROMPT] = arguments[PROMPT].repeat_interleave(frames, dim=0)
    return module(**arguments, return_dict=False)[0]


ANIMATED = Architecture(
    "UNetMotionModel",
    _animated,
    {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280},
    call=_repeated,
)
UNET3D = Architecture(
    "UNet3DConditionModel", _animated, {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1024}
)
STABLE_VIDEO = Architecture(
    "UNetSpatioTemporalConditionModel",
    _stable_video,
    {
        "in_channels": 8,
        "out_channels": 4,
        "cross_attention_dim": 1024,
        "num_frames": 25,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 768,
    },
    call=_joined,
)
