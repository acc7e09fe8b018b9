"""UNet2DModel: no prompt; perhaps class labels."""

from __future__ import annotations

from .row import Architecture, Asked, Input, NetworkInputs

CONDITIONAL = "UNet2DConditionModel"


def class_input(asked: Asked) -> dict[str, Input]:
    """Return the class embedding's input: labels of a table, a number, or a vector. Both U-Nets have these keys."""
    kind = asked.config.get("class_embed_type")
    if kind is None:
        classes = asked.config.get("num_class_embeds")
        return {} if classes is None else {"class_labels": Input((), int(classes))}
    if kind == "timestep":  # a level of noise, counted in training timesteps
        return {"class_labels": Input((), 1000)}
    if kind == "identity":
        return {"class_labels": Input((_time_width(asked),))}
    if kind in ("projection", "simple_projection"):
        return {"class_labels": Input((asked.number("projection_class_embeddings_input_dim"),))}
    raise asked.error(f"a {asked.name} with class_embed_type {kind!r} is not known")


def _time_width(asked: Asked) -> int:
    """Return the width of the time embedding."""
    factor = 2 if asked.config.get("time_embedding_type") == "fourier" and asked.name == CONDITIONAL else 4
    return int(asked.config.get("time_embedding_dim") or factor * asked.config["block_out_channels"][0])


def _inputs(asked: Asked) -> NetworkInputs:
    channels = asked.number("in_channels")
    multiple = 2 ** (len(asked.config["block_out_channels"]) - 1)
    return NetworkInputs("sample", (channels, *asked.side()), class_input(asked), multiple, asked.predicted)


UNET2D = Architecture(
    "UNet2DModel", _inputs, {"in_channels": 3, "out_channels": 3, "block_out_channels": (224, 448, 672, 896)}
)
