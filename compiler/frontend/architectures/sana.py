"""Sana: linear attention, prompts with a mask; Sana-Sprint has an embedded guidance."""

from __future__ import annotations

from .row import Architecture, Asked, Input, NetworkInputs

_PROMPT, _MASK = "encoder_hidden_states", "encoder_attention_mask"


def _inputs(asked: Asked) -> NetworkInputs:
    channels, tokens = asked.number("in_channels"), asked.tokens(_PROMPT, 300)
    predicted = int(asked.config.get("out_channels") or channels)
    conditions = {_PROMPT: Input((tokens, asked.number("caption_channels"))), _MASK: Input((tokens,), kind="mask")}
    if asked.config.get("guidance_embeds"):
        conditions["guidance"] = Input(())
    shape = (channels, *asked.side())
    return NetworkInputs("hidden_states", shape, conditions, asked.number("patch_size"), predicted)


SANA = Architecture(
    "SanaTransformer2DModel",
    _inputs,
    {"in_channels": 32, "out_channels": 32, "caption_channels": 2304, "sample_size": 32, "patch_size": 1},
)
