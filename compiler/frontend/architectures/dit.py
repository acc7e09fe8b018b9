"""DiT: class labels, a table of positions of one size, variances behind the noise."""

from __future__ import annotations

from ...errors import ModelError
from .row import Architecture, Asked, Input, NetworkInputs, kept_of_doubled


def _inputs(asked: Asked) -> NetworkInputs:
    channels = asked.number("in_channels")
    side = asked.config.get("sample_size") or 32
    height, width = asked.side()
    if (height, width) != (side, side):
        raise ModelError(f"the model's samples are {side}x{side}, not {height}x{width}", hint="drop --size")
    predicted = int(asked.config.get("out_channels") or channels)
    labels = {"class_labels": Input((), int(asked.config["num_embeds_ada_norm"]))}
    shape, kept = (channels, side, side), kept_of_doubled(channels, predicted)
    return NetworkInputs("hidden_states", shape, labels, None, predicted, kept)


DIT = Architecture("DiTTransformer2DModel", _inputs, {"in_channels": 4, "num_embeds_ada_norm": 1000})
