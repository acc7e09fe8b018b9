"""The scalars of each network call of a sampler: a function of the schedule and the number of steps alone.

Every sampler here is linear between two network calls, except for the clipping of the predicted image. The state is an
array `x`, the network's input, and the arrays that a solver of higher order remembers, by name:

    image = clip(image_x * x + image_out * out)                the image that the network predicts
    x'    = sum of next[name] * array[name] + noise * z        over x, out, image and the remembered arrays
    kept  = sum of keep[kept][name] * array[name]              remembered for the next call

Samplers with another scaling of the state in their papers (Euler, Heun: x / alpha) are rewritten in the scaling of the
network, so that no call has to scale its input.

With a `Correction` the variance that quantization noise adds to x' is subtracted from the sampler's own noise, see
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
"""`x` and the remembered arrays, each float32 `[B, ...]`."""
Weights = Mapping[str, float]
FIRST = 0  # the stage of every call of a sampler that calls the network once a step


@dataclass(frozen=True)
class Step:
    """One network call and the scalars around it, see the module's formulas.

    `sigma` is the standard deviation of the sampler's own noise. `stage` numbers the calls within one step (Heun: 0 and
    1): their errors differ, though their timestep may be the same.
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

    @property
    def rows(self) -> dict[str, Weights]:
        """The sums that this call computes, by name: the remembered arrays, then `x`. They read `image` only where it
        is clipped; otherwise the image is itself a sum, and its weights are merged: two passes instead of four."""
        rows = {**self.keep, "x": self.next}
        return rows if self.clip is not None else {name: self._without_image(row) for name, row in rows.items()}

    @property
    def image_row(self) -> Weights:
        """The predicted image as a sum, before it is clipped."""
        return {"out": self.image_out, "x": self.image_x}

    def advance(self, state: State, out: Images, scratch: Images) -> State:
        """Return the state after this call, without its noise; `out` and `scratch` may be reused afterwards."""
        arrays = {**state, "out": out}
        rows = self.rows
        if self.clip is not None and any("image" in row for row in rows.values()):
            image = _sum(self.image_row, arrays, scratch)
            arrays["image"] = np.clip(image, -self.clip, self.clip, out=image)
        return {
            name: array if name != "x" and (array := self._same(row, state)) is not None else _sum(row, arrays, scratch)
            for name, row in rows.items()
        }

    def _without_image(self, row: Weights) -> Weights:
        """Return the row without the image."""
        if "image" not in row:
            return row
        share = row["image"]
        merged = {name: weight for name, weight in row.items() if name != "image"}
        for name, weight in (("x", self.image_x), ("out", self.image_out)):
            merged[name] = merged.get(name, 0.0) + share * weight
        return merged

    @staticmethod
    def _same(row: Weights, state: State) -> Images | None:
        """Return an array that is kept unchanged, or None. States are never written to again; x is always new."""
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
    """Return the weighted sum as a new array; terms of weight 0 cost nothing."""
    terms = [(weight, arrays[name]) for name, weight in row.items() if weight]
    if not terms:
        return np.zeros_like(scratch)
    (weight, array), *more = terms
    total: Images = array * np.float32(weight)
    for weight, array in more:
        total += np.multiply(array, np.float32(weight), out=scratch)
    return total


def image_of(schedule: Schedule, alpha: float, sigma: float) -> tuple[float, float]:
    """Return (image_x, image_out) for x = alpha * image + sigma * noise. Raises InputError for epsilon at alpha 0."""
    kind = schedule.prediction
    if kind == "epsilon":
        if alpha == 0:
            raise InputError("epsilon does not determine the image where the schedule has no signal left")
        return 1 / alpha, -sigma / alpha
    if kind == "v_prediction":
        return alpha, -sigma
    if kind == "flow_prediction":
        return 1.0, -sigma
    if kind == "reversed_flow_prediction":
        return 1.0, sigma
    return 0.0, 1.0


def noise_of(schedule: Schedule, alpha: float, sigma: float) -> tuple[float, float]:
    """Return the noise in x as (share of x, share of the output), where x = alpha * image + sigma * noise."""
    kind = schedule.prediction
    if kind == "epsilon":
        return 0.0, 1.0
    if kind == "v_prediction":
        return sigma, alpha
    if kind == "flow_prediction":
        return 1.0, alpha
    if kind == "reversed_flow_prediction":
        return 1.0, -alpha
    return 1 / sigma, -alpha / sigma
