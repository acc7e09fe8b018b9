"""Video transformers over latents `[B, C, T, H, W]`: Wan and HunyuanVideo. A size is T, H and W, or H and W alone."""

from __future__ import annotations

from .patches import fill_flags
from .row import PROMPT, PROMPT_LENGTH, Architecture, Asked, Input, NetworkInputs, masked_prompt

_USUAL = (60, 104)  # latents of a video of 480 x 832 pixels


def frames_of(asked: Asked, usual: int) -> int:
    """Return the frames of latents that are asked for."""
    return int(asked.size[-3]) if asked.size is not None and len(asked.size) > 2 else usual


def _latents(asked: Asked, frames: int, conditions: dict[str, Input]) -> NetworkInputs:
    channels = asked.number("in_channels")
    height, width = asked.side() if asked.size else _USUAL
    return NetworkInputs("hidden_states", (channels, frames, height, width), conditions, None, asked.predicted)


def _wan(asked: Asked) -> NetworkInputs:
    conditions = {PROMPT: Input((asked.tokens(PROMPT, 512), asked.number("text_dim")), length=PROMPT_LENGTH)}
    if asked.config.get("image_dim") is not None:
        image = "encoder_hidden_states_image"
        conditions[image] = Input((asked.tokens(image, 257), asked.number("image_dim")))
    return _latents(asked, frames_of(asked, 21), conditions)


def _hunyuan(asked: Asked) -> NetworkInputs:
    if (kind := asked.config.get("image_condition_type")) is not None:
        raise asked.error(f"a HunyuanVideo with image_condition_type {kind!r} cannot be exported yet")
    conditions = masked_prompt(asked, 256, asked.number("text_embed_dim"))
    conditions["pooled_projections"] = Input((asked.number("pooled_projection_dim"),))
    if asked.config["guidance_embeds"]:
        conditions["guidance"] = Input(())
    return _latents(asked, frames_of(asked, 33), conditions)


WAN = Architecture("WanTransformer3DModel", _wan, {"in_channels": 16, "out_channels": 16, "text_dim": 4096})
HUNYUAN_VIDEO = Architecture(
    "HunyuanVideoTransformer3DModel",
    _hunyuan,
    {
        "in_channels": 16,
        "out_channels": 16,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    sigmas="even",
    patches=(fill_flags,),
)
