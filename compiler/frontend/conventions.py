"""What networks of known classes expect of a sampler and an exported graph does not say.

The values are those that the pipelines of diffusers pass: the unit of the timestep, and the sign of the velocity.
Classes with a row of the registry have them there; this file knows those of which an ONNX file may come.
Lumina's and Z-Image's time runs from noise to image, and so does the velocity that they predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Prediction, Signature, TimestepUnit

from ..errors import ModelError
from ..graph.nodes import name_of
from .architectures.registry import ROWS
from .network_inputs import network_inputs

_WITHOUT_ROW: dict[str, TimestepUnit] = {
    "BriaFiboTransformer2DModel": "steps",
    "CogView4Transformer2DModel": "steps",
    "HiDreamImageTransformer2DModel": "steps",
    "LongCatImageTransformer2DModel": "fraction",
    "LuminaNextDiT2DModel": "reversed_fraction",
    "NucleusMoEImageTransformer2DModel": "fraction",
    "OvisImageTransformer2DModel": "fraction",
    "PRXTransformer2DModel": "fraction",
}
_REVERSED_WITHOUT_ROW = frozenset(
    {"HiDreamImageTransformer2DModel", "LuminaNextDiT2DModel", "NucleusMoEImageTransformer2DModel"}
)


_USUAL_GUIDANCE = {
    "Flux2Transformer2DModel": 4.0,
    "FluxTransformer2DModel": 3.5,
    "HunyuanVideoTransformer3DModel": 6000.0,  # its pipeline passes thousandths
    "SanaTransformer2DModel": 0.45,  # Sana-Sprint's 4.5, times its guidance_embeds_scale
}
_GUIDANCE = "guidance"


def usual_guidance(signature: Signature, config: Mapping[str, Any] | None) -> dict[str, npt.NDArray[np.float32]]:
    """Return one row of an embedded guidance: the scale that the pipelines of the class pass, where it is not given."""
    usual = _USUAL_GUIDANCE.get(str((config or {}).get(CLASS)))
    if usual is None or _GUIDANCE not in signature.conditions:
        return {}
    return {_GUIDANCE: np.full(1, usual, np.float32)}


def with_known_labels(signature: Signature, graph: ir.Graph, config: Mapping[str, Any] | None) -> Signature:
    """Return the signature of an ONNX file with the conditions that its configuration says to be class labels."""
    name = str((config or {}).get(CLASS))
    if name not in ROWS:
        return signature
    try:
        known = network_inputs(name, config or {}, None, {}).labels
    except ModelError:  # the configuration lacks what an export needs, and a graph does not
        return signature
    integers = {name_of(value) for value in graph.inputs if value.dtype == ir.DataType.INT64}
    labels = tuple(label for label in known if label.name in signature.conditions and label.name in integers)
    return replace(signature, labels=labels)


def known_unit(config: Mapping[str, Any] | None, schedule: Schedule) -> TimestepUnit | None:
    """Return the unit of a network's timestep by the class of its configuration, None for a class that is not known."""
    if config is None or not schedule.flow:
        return None
    name = str(config.get(CLASS))
    unit = ROWS[name].unit if name in ROWS else _WITHOUT_ROW.get(name)
    scale = config.get("timestep_scale")
    if unit == "steps" and isinstance(scale, float) and abs(scale * schedule.num_train_timesteps - 1) < 1e-9:
        return "fraction"
    return unit


def known_prediction(config: Mapping[str, Any] | None, schedule: Schedule) -> Prediction | None:
    """Return what a network predicts by the class of its configuration, unless the schedule says it itself."""
    if config is None or not schedule.flow or schedule.config.get("prediction_type") is not None:
        return None
    name = str(config.get(CLASS))
    reverses = ROWS[name].reversed_velocity if name in ROWS else name in _REVERSED_WITHOUT_ROW
    return "reversed_flow_prediction" if reverses else None
