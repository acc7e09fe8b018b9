"""DiT: class labels, a table of positions of one size, variances behind the noise."""

from __future__ import annotations

from .row import Architecture, Asked, Input, NetworkInputs, kept_of_doubled


def _inputs(asked: Asked) -> NetworkInputs:
    channels = asked.number("in_channels")
    side = asked.config.get("sample_size") or 32
    height, width = asked.side()
    if (height, width) != (side, side):
        raise asked.error(f"the model's samples are {side}x{side}, not {height}x{width}", "drop --size")
    classes = asked.number("num_embeds_ada_norm")  # its table of labels has one more row, that of no class
    labels = {"class_labels": Input((), classes, null=classes)}
    shape, kept = (channels, side, side), kept_of_doubled(channels, asked.predicted)
    return NetworkInputs("hidden_states", shape, labels, None, asked.predicted, kept)


DIT = Architecture("DiTTransformer2DModel", _inputs, {"in_channels": 4, "num_embeds_ada_norm": 1000})
