"""PixArt-alpha and PixArt-Sigma: prompts with a mask of their tokens, variances behind the noise."""

from __future__ import annotations

from .patches import keep_sizes
from .row import Architecture, Asked, Input, NetworkInputs, kept_of_doubled, masked_prompt

_WITH_SIZES = 128  # the sample size from which on diffusers' default is to read the resolution


def _inputs(asked: Asked) -> NetworkInputs:
    config = asked.config
    channels = asked.number("in_channels")
    width = int(config.get("caption_channels") or config["cross_attention_dim"])
    conditions = masked_prompt(asked, 300, width)
    sized = config.get("use_additional_conditions")
    if sized if sized is not None else config["sample_size"] == _WITH_SIZES:
        conditions["resolution"] = Input((2,), path=("added_cond_kwargs", "resolution"))
        conditions["aspect_ratio"] = Input((1,), path=("added_cond_kwargs", "aspect_ratio"))
    shape, kept = (channels, *asked.side()), kept_of_doubled(channels, asked.predicted)
    return NetworkInputs("hidden_states", shape, conditions, asked.number("patch_size"), asked.predicted, kept)


PIXART = Architecture(
    "PixArtTransformer2DModel",
    _inputs,
    {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 1152, "sample_size": 128, "patch_size": 2},
    patches=(keep_sizes,),
)
