"""Sana: linear attention, prompts with a mask; Sana-Sprint has an embedded guidance."""

from __future__ import annotations

from .patches import keep_epsilon
from .row import Architecture, Asked, Input, NetworkInputs, masked_prompt


def _inputs(asked: Asked) -> NetworkInputs:
    channels, conditions = asked.number("in_channels"), masked_prompt(asked, 300, asked.number("caption_channels"))
    if asked.config.get("guidance_embeds"):
        conditions["guidance"] = Input(())
    shape = (channels, *asked.side())
    return NetworkInputs("hidden_states", shape, conditions, asked.number("patch_size"), asked.predicted)


SANA = Architecture(
    "SanaTransformer2DModel",
    _inputs,
    {"in_channels": 32, "out_channels": 32, "caption_channels": 2304, "sample_size": 32, "patch_size": 1},
    patches=(keep_epsilon,),
)
