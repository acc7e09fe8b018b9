"""The inputs of a diffusers network by its configuration alone: what is known before torch loads the weights.

`example_of` (torch_example.py) makes tensors of these sizes for the export, and `--dry-run` compares conditions with
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..errors import ModelError

DIT = "DiTTransformer2DModel"
CONDITIONAL = "UNet2DConditionModel"
SUPPORTED = ("UNet2DModel", CONDITIONAL, DIT)
USUAL_TOKENS = 77
TIME_IDS = 6  # of SDXL's base model; its refiner has 5
# Defaults of diffusers, for a config.json that leaves them out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {"in_channels": 3, "out_channels": 3, "block_out_channels": (224, 448, 672, 896)},
    CONDITIONAL: {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1280,
    },
    DIT: {"in_channels": 4, "num_embeds_ada_norm": 1000},
}
ConditionSizes = Mapping[str, tuple[int, ...]]
"""ConditionSizes of a condition behind its rows, by name."""


@dataclass(frozen=True)
class Input:
    """One input: its sizes behind the batch, and the number of classes of an input of labels."""

    sizes: tuple[int, ...]
    classes: int | None = None

    def value(self, name: str) -> ir.Value:
        """Return it as a graph input with an open batch."""
        dtype = ir.DataType.FLOAT if self.classes is None else ir.DataType.INT64
        return ir.Value(name=name, shape=ir.Shape(["batch", *self.sizes]), type=ir.TensorType(dtype))


@dataclass(frozen=True)
class NetworkInputs:
    """The sample and the conditions by name, the names of sample and output channels, and what stays open.

    Height and width are multiples of `multiple`, or fixed when that is None. `predicted` are the output's channels, and
    `kept` those that the export keeps.
    """

    sample: str
    shape: tuple[int, ...]
    conditions: Mapping[str, Input]
    multiple: int | None
    predicted: int
    kept: int | None = None


def network_inputs(
    name: str, config: Mapping[str, Any], size: tuple[int, ...] | None, sizes: ConditionSizes, where: str = "the model"
) -> NetworkInputs:
    """Return the inputs of a network of class `name`. `sizes` are those that conditions are known to have.

    Raises ModelError for classes and configurations that are not supported.
    """
    if name not in SUPPORTED:
        raise unsupported(name, where)
    known = {**_DEFAULTS[name], **{key: value for key, value in config.items() if value is not None}}
    side = known.get("sample_size") or 32
    height, width = size or ((side, side) if isinstance(side, int) else tuple(side))
    channels = int(known["in_channels"])
    if name == DIT:
        if (height, width) != (side, side):
            raise ModelError(f"the model's samples are {side}x{side}, not {height}x{width}", hint="drop --size")
        predicted = int(known.get("out_channels", channels))
        labels = {"class_labels": Input((), int(known["num_embeds_ada_norm"]))}
        kept = channels if predicted == 2 * channels else None
        return NetworkInputs("hidden_states", (channels, side, side), labels, None, predicted, kept)
    for key, allowed in (
        ("addition_embed_type", "text_time"),
        ("class_embed_type", None),
        ("encoder_hid_dim_type", None),
    ):
        if (value := known.get(key)) not in (None, allowed):
            raise ModelError(
                f"a {name} with {key} {value!r} cannot be exported yet",
                where=where,
                hint="export it to ONNX yourself and compile the .onnx file",
            )
    conditions: dict[str, Input] = {}
    if name == CONDITIONAL:
        tokens = sizes.get("encoder_hidden_states", (USUAL_TOKENS,))[0]
        conditions["encoder_hidden_states"] = Input((tokens, _first(known["cross_attention_dim"])))
        if (width_in := known.get("time_cond_proj_dim")) is not None:
            conditions["timestep_cond"] = Input((int(width_in),))
        if known.get("addition_embed_type") == "text_time":
            conditions |= _text_time(known, sizes, where)
    if known.get("num_class_embeds") is not None:
        conditions["class_labels"] = Input((), int(known["num_class_embeds"]))
    multiple = 2 ** (len(known["block_out_channels"]) - 1)
    return NetworkInputs(
        "sample", (channels, int(height), int(width)), conditions, multiple, int(known.get("out_channels", channels))
    )


def _text_time(config: Mapping[str, Any], sizes: ConditionSizes, where: str) -> dict[str, Input]:
    """Return SDXL's pooled prompt and time ids, which share the width of one layer."""
    width, each = (config.get(key) for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"))
    if not isinstance(width, int) or not isinstance(each, int) or each < 1:
        raise ModelError(
            f"the configuration says no sizes of text_embeds and time_ids: {width!r}, {each!r}",
            where=where,
            hint="set projection_class_embeddings_input_dim and addition_time_embed_dim as the weights have them",
        )
    if "text_embeds" in sizes:
        ids, rest = divmod(width - sizes["text_embeds"][0], each)
    else:
        ids, rest = sizes.get("time_ids", (TIME_IDS,))[0], 0
    if rest or ids < 1 or width - ids * each < 1:
        raise ModelError(
            f"text_embeds and time_ids do not fit: the model takes {width} numbers of both, {each} for each time id",
            where=where,
            hint="give the conditions of this model's own pipeline: --conditions FILE.npz",
        )
    return {"text_embeds": Input((width - ids * each,)), "time_ids": Input((ids,))}


def unsupported(name: str, where: str) -> ModelError:
    """Return the error for a class that is not in SUPPORTED."""
    return ModelError(
        f"{name} cannot be exported yet; {', '.join(SUPPORTED[:-1])} and {SUPPORTED[-1]} can",
        where=where,
        hint="export it to ONNX yourself and compile the .onnx file",
    )


def _first(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])
