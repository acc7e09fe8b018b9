"""The U-Net of Kandinsky 3: one prompt with a mask."""

from __future__ import annotations

from .row import Architecture, Asked, Input, NetworkInputs

_PROMPT, _MASK = "encoder_hidden_states", "encoder_attention_mask"


def _inputs(asked: Asked) -> NetworkInputs:
    channels, tokens = asked.number("in_channels"), asked.tokens(_PROMPT, 128)
    conditions = {_PROMPT: Input((tokens, asked.number("encoder_hid_dim"))), _MASK: Input((tokens,), kind="mask")}
    multiple = 2 ** (len(asked.config["block_out_channels"]) - 1)
    return NetworkInputs("sample", (channels, *asked.side(128)), conditions, multiple, channels)


KANDINSKY3 = Architecture(
    "Kandinsky3UNet",
    _inputs,
    {"in_channels": 4, "block_out_channels": (384, 768, 1536, 3072), "encoder_hid_dim": 4096},
)
