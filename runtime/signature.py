"""The meaning of a denoiser's inputs and output, and the types of arrays and timesteps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .errors import ScheduleError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
Images = npt.NDArray[np.float32]
"""Samples or predictions, float32 `[B, C, H, W]`."""
Timestep = float
"""An int for a training timestep; samplers that interpolate between these have others."""
Predict = Callable[[Images, Timestep], Images]
"""A network with its conditions: `(x float32 [B, C, H, W], timestep) -> raw output of the same shape`."""
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


@dataclass(frozen=True)
class Signature:
    """Names of a denoiser's inputs and output, and its prediction type.

    `sample` is float32 `[batch, channels, height, width]`; `timestep` is an integer or float scalar or `[batch]`;
    `conditions` are all other inputs, in the order of the graph.
    """

    sample: str
    timestep: str
    output: str
    conditions: tuple[str, ...] = ()
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ScheduleError(
                f"unknown prediction type {self.prediction!r}",
                hint=f"use one of {', '.join(PREDICTIONS)}",
            )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "conditions": list(self.conditions)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Signature:
        """Return the signature of plain data. Raises KeyError, TypeError or ValueError for anything else."""
        conditions = data["conditions"]
        names = [*(value for key, value in data.items() if key != "conditions"), *conditions]
        if not isinstance(conditions, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("names are texts, and conditions are a list of them")
        return cls(**{**data, "conditions": tuple(conditions)})


def whole(timesteps: Any) -> list[Timestep]:
    """Return timesteps as plain numbers, integers where they are whole."""
    return [int(t) if float(t).is_integer() else float(t) for t in timesteps]
