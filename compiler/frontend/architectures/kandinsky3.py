"""The U-Net of Kandinsky 3: one prompt with a mask."""

from __future__ import annotations

from .row import Architecture, Asked, NetworkInputs, masked_prompt


def _inputs(asked: Asked) -> NetworkInputs:
    channels, conditions = asked.number("in_channels"), masked_prompt(asked, 128, asked.number("encoder_hid_dim"))
    multiple = 2 ** (len(asked.config["block_out_channels"]) - 1)
    return NetworkInputs("sample", (channels, *asked.side(128)), conditions, multiple, channels)


KANDINSKY3 = Architecture(
    "Kandinsky3UNet",
    _inputs,
    {"in_channels": 4, "block_out_channels": (384, 768, 1536, 3072), "encoder_hid_dim": 4096},
)
