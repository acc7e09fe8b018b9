"""What networks of known classes expect of a sampler and an exported graph does not say.

The values are those that the pipelines of diffusers pass: the unit of the timestep, and the sign of the velocity.
Lumina's and Z-Image's time runs from noise to image, and so does the velocity that they predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Prediction, TimestepUnit

UNITS: dict[str, TimestepUnit] = {
    "AuraFlowTransformer2DModel": "fraction",
    "BriaFiboTransformer2DModel": "steps",
    "ChromaTransformer2DModel": "fraction",
    "CogView4Transformer2DModel": "steps",
    "Flux2Transformer2DModel": "fraction",
    "FluxTransformer2DModel": "fraction",
    "HiDreamImageTransformer2DModel": "steps",
    "LongCatImageTransformer2DModel": "fraction",
    "Lumina2Transformer2DModel": "reversed_fraction",
    "LuminaNextDiT2DModel": "reversed_fraction",
    "NucleusMoEImageTransformer2DModel": "fraction",
    "PRXTransformer2DModel": "fraction",
    "OvisImageTransformer2DModel": "fraction",
    "QwenImageTransformer2DModel": "fraction",
    "SD3Transformer2DModel": "steps",
    "SanaTransformer2DModel": "steps",
    "ZImageTransformer2DModel": "reversed_fraction",
}
REVERSED_VELOCITY = frozenset(
    {
        "HiDreamImageTransformer2DModel",
        "Lumina2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "NucleusMoEImageTransformer2DModel",
        "ZImageTransformer2DModel",
    }
)


def known_unit(config: Mapping[str, Any] | None, schedule: Schedule) -> TimestepUnit | None:
    """Return the unit of a network's timestep by the class of its configuration, None for a class that is not known."""
    if config is None or not schedule.flow:
        return None
    unit = UNITS.get(str(config.get(CLASS)))
    scale = config.get("timestep_scale")
    if unit == "steps" and isinstance(scale, float) and abs(scale * schedule.num_train_timesteps - 1) < 1e-9:
        return "fraction"
    return unit


def known_prediction(config: Mapping[str, Any] | None, schedule: Schedule) -> Prediction | None:
    """Return what a network predicts by the class of its configuration, unless the schedule says it itself."""
    if config is None or not schedule.flow or schedule.config.get("prediction_type") is not None:
        return None
    return "reversed_flow_prediction" if config.get(CLASS) in REVERSED_VELOCITY else None
