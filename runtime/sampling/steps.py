"""What one network call of a sampler computes, as scalars: a function of the schedule and the number of steps alone.

Every sampler here is linear between two network calls, apart from the clipping of the predicted image. The state is an
array `x`, which is also what the network sees, and what a solver of higher order remembers, by name:

    image = clip(image_x * x + image_out * out)                what the network says the picture is
    x'    = sum of next[name] * array[name] + noise * z        over x, out, image and what is remembered
    kept  = sum of keep[kept][name] * array[name]              what the next call will remember

Samplers that are written down for another scaling of the state (Euler, Heun: x / alpha) are rewritten in the network's,
so that no call has to scale its input.

With a `Correction` what quantization noise does to the variance of x' is taken out of the sampler's own noise, see
correction.py. Only the noise changes; the direction keeps the sigma that it was derived with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError
from ..signature import Images, Timestep
from .schedule import Schedule

State = dict[str, Images]
"""`x` and what is remembered, each float32 `[B, C, H, W]`."""
Weights = Mapping[str, float]
FIRST = 0  # the stage of every call of a sampler that calls the network once a step


@dataclass(frozen=True)
class Step:
    """One network call and the scalars around it, see the module's formulas.

    `sigma` is the sampler's own standard deviation of the noise. `stage` tells calls apart that a solver makes in one
    step (Heun: 0 and 1): their errors are different ones, though their timestep may be the same.
    """

    timestep: Timestep
    image_x: float
    image_out: float
    next: Weights
    keep: Mapping[str, Weights] = field(default_factory=dict)
    sigma: float = 0.0
    clip: float | None = None
    stage: int = FIRST

    @property
    def gain(self) -> float:
        """The coefficient of the newest output in x', where nothing is clipped."""
        return self.next.get("out", 0.0) + self.next.get("image", 0.0) * self.image_out

    @property
    def carry(self) -> float:
        """The coefficient of x in x', where nothing is clipped."""
        return self.next.get("x", 0.0) + self.next.get("image", 0.0) * self.image_x

    def advance(self, state: State, out: Images, scratch: Images) -> State:
        """The state behind this call without its noise; `out` and `scratch` may be used again afterwards."""
        arrays = {**state, "out": out}
        rows = {**self.keep, "x": self.next}
        if any("image" in row for row in rows.values()):
            if self.clip is None:
                rows = {name: self._without_image(row) for name, row in rows.items()}
            else:
                image = _sum({"out": self.image_out, "x": self.image_x}, arrays, scratch)
                arrays["image"] = np.clip(image, -self.clip, self.clip, out=image)
        return {
            name: array if name != "x" and (array := self._same(row, state)) is not None else _sum(row, arrays, scratch)
            for name, row in rows.items()
        }

    def _without_image(self, row: Weights) -> Weights:
        """Two passes over the arrays instead of four: where nothing is clipped, the image is a sum as well."""
        if "image" not in row:
            return row
        share = row["image"]
        merged = {name: weight for name, weight in row.items() if name != "image"}
        for name, weight in (("x", self.image_x), ("out", self.image_out)):
            merged[name] = merged.get(name, 0.0) + share * weight
        return merged

    @staticmethod
    def _same(row: Weights, state: State) -> Images | None:
        """An array that is remembered as it is; nobody writes to a state again. x is always a new one."""
        (name, weight), *more = row.items()
        return state.get(name) if weight == 1.0 and not more else None


@dataclass(frozen=True)
class Solver:
    """All calls of a sampler. The first x is `start` times standard normal noise."""

    steps: tuple[Step, ...]
    start: float = 1.0

    @property
    def calls(self) -> tuple[Timestep, ...]:
        """The timestep of each network call, in order."""
        return tuple(step.timestep for step in self.steps)


def _sum(row: Weights, arrays: Mapping[str, Images], scratch: Images) -> Images:
    """The weighted sum as a new array; terms whose weight is 0 cost nothing."""
    terms = [(weight, arrays[name]) for name, weight in row.items() if weight]
    if not terms:
        return np.zeros_like(scratch)
    (weight, array), *more = terms
    total: Images = array * np.float32(weight)
    for weight, array in more:
        total += np.multiply(array, np.float32(weight), out=scratch)
    return total


def image_of(schedule: Schedule, alpha: float, sigma: float) -> tuple[float, float]:
    """(image_x, image_out), where x = alpha * image + sigma * noise. Raises InputError where alpha is 0 and matters."""
    kind = schedule.prediction
    if kind == "epsilon":
        if alpha == 0:
            raise InputError("epsilon says nothing about the image where the schedule has no signal left")
        return 1 / alpha, -sigma / alpha
    if kind == "v_prediction":
        return alpha, -sigma
    if kind == "flow_prediction":
        return 1.0, -sigma
    return 0.0, 1.0


def noise_of(schedule: Schedule, alpha: float, sigma: float) -> tuple[float, float]:
    """The noise in x as (share of x, share of the output), where x = alpha * image + sigma * noise."""
    kind = schedule.prediction
    if kind == "epsilon":
        return 0.0, 1.0
    if kind == "v_prediction":
        return sigma, alpha
    if kind == "flow_prediction":
        return 1.0, alpha
    return 1 / sigma, -alpha / sigma
