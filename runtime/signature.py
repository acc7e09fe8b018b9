"""The meaning of a denoiser's inputs and output, and the types of arrays and timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .errors import ScheduleError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction", "reversed_flow_prediction"]
"""`reversed_flow_prediction` is the velocity of a network whose time runs from noise to image: image - noise."""
TimestepUnit = Literal["steps", "fraction", "reversed_fraction"]
"""What a network's timestep input counts, for training timestep t of N: t, t / N, or 1 - t / N."""
Images = npt.NDArray[np.float32]
"""Samples or predictions, float32 `[B, C, ...]`: `[B, C, H, W]` of images, `[B, C, L]` of audio, `[B, C, T, H, W]` of
video, and `[B, N, C]` of tokens, where the signature's `channel_axis` is the last axis."""
Timestep = float
"""An int for a training timestep; samplers that interpolate between these have others."""
Predict = Callable[[Images, Timestep], Images]
"""A network with its conditions: `(x float32 [B, C, ...], timestep) -> raw output of the same shape`."""
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
TIMESTEP_UNITS: tuple[str, ...] = get_args(TimestepUnit)
EXTRA_CHANNELS = "extra_channels"
"""The condition that holds the input channels that a network does not predict, `[B, C', H, W]`: a mask, an image."""
CHANNELS_FIRST = 1
"""The usual axis of the channels: the one behind the batch."""
IMAGE_RANK = 4
"""The axes of a batch of images, `[B, C, H, W]`."""
MOST_CLASSES = 1 << 20
MOST_RANK = 8
"""The most axes that a sample has, its batch counted."""


@dataclass(frozen=True)
class ClassLabels:
    """A condition of class labels, integers 0 .. classes - 1; `null` is the label of no class, which guidance needs."""

    name: str
    classes: int
    null: int

    @classmethod
    def from_json(cls, data: Any) -> ClassLabels:
        """Return the labels of plain data. Raises KeyError, TypeError or ValueError for anything else."""
        name, classes, null = data["name"], data["classes"], data["null"]
        if not isinstance(name, str) or any(type(n) is not int for n in (classes, null)):
            raise ValueError("labels have a name, a number of classes, and the label of no class")
        if not (1 <= classes <= MOST_CLASSES and null >= 0):
            raise ValueError(f"there are 1 to {MOST_CLASSES} classes, and labels from 0")
        return cls(name, classes, null)


@dataclass(frozen=True)
class Signature:
    """Names of a denoiser's inputs and output, its prediction type, and the unit of its timestep.

    `sample` is float32 `[batch, ...]` with its channels along `channel_axis`: 1, the last one for tokens `[batch,
    tokens, channels]`, or 2 for video `[batch, frames, channels, height, width]`. `timestep` is an integer or float
    scalar or `[batch]`; `conditions` are all other inputs, in the order of the graph. `num_train_timesteps` is the N of
    the unit. `labels` are the conditions that are known to be class labels.
    """

    sample: str
    timestep: str
    output: str
    conditions: tuple[str, ...] = ()
    prediction: Prediction = "epsilon"
    timestep_unit: TimestepUnit = "steps"
    num_train_timesteps: int = 1000
    channel_axis: int = CHANNELS_FIRST
    labels: tuple[ClassLabels, ...] = ()

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ScheduleError(
                f"unknown prediction type {self.prediction!r}",
                hint=f"use one of {', '.join(PREDICTIONS)}",
            )
        if self.timestep_unit not in TIMESTEP_UNITS:
            raise ScheduleError(
                f"unknown timestep unit {self.timestep_unit!r}", hint=f"use one of {', '.join(TIMESTEP_UNITS)}"
            )

    def channels(self, shape: Sequence[int]) -> int:
        """Return the channels of a sample whose sizes behind the batch are `shape`."""
        return shape[self.channel_axis - 1]

    def sides(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes behind the batch without the channels: (height, width) of an image."""
        return (*shape[: self.channel_axis - 1], *shape[self.channel_axis :])

    def network_time(self, timestep: Timestep) -> Timestep:
        """Return a training timestep in the unit of the network's input."""
        if self.timestep_unit == "steps":
            return timestep
        fraction = float(timestep) / self.num_train_timesteps
        return fraction if self.timestep_unit == "fraction" else 1 - fraction

    def to_json(self) -> dict[str, Any]:
        """Return plain data; the usual cases have no keys: a timestep that counts steps, channels along axis 1, no
        class labels."""
        data = {**asdict(self), "conditions": list(self.conditions), "labels": [asdict(label) for label in self.labels]}
        usual = {"timestep_unit", "num_train_timesteps"} if self.timestep_unit == "steps" else set()
        usual |= {"channel_axis"} if self.channel_axis == CHANNELS_FIRST else set()
        usual |= set() if self.labels else {"labels"}
        return {key: value for key, value in data.items() if key not in usual}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Signature:
        """Return the signature of plain data. Raises KeyError, TypeError or ValueError for anything else."""
        conditions = data["conditions"]
        numbers = ("conditions", "num_train_timesteps", "channel_axis", "labels")
        names = [*(value for key, value in data.items() if key not in numbers), *conditions]
        if not isinstance(conditions, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("names are texts, and conditions are a list of them")
        axis = data.get("channel_axis", CHANNELS_FIRST)
        if type(axis) is not int or not 1 <= axis < MOST_RANK:
            raise ValueError(f"the axis of the channels is an integer from 1 to {MOST_RANK - 1}")
        labels = tuple(ClassLabels.from_json(item) for item in data.get("labels", ()))
        return cls(**{**data, "conditions": tuple(conditions), "labels": labels})


def no_image(shape: Sequence[int]) -> str | None:
    """Return why samples with these sizes behind the batch are not images; None for (1 or 3, height, width)."""
    if len(shape) != 3:
        return f"samples of shape {'x'.join(map(str, shape))} are not images"
    return None if shape[0] in (1, 3) else f"samples of {shape[0]} channels are latents, not images"


def whole(timesteps: Any) -> list[Timestep]:
    """Return timesteps as plain numbers, integers where they are whole."""
    return [int(t) if float(t).is_integer() else float(t) for t in timesteps]
