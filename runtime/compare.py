"""How far two results are apart, in decibels. There are no thresholds here: the caller has the tolerance.

Identical results have an infinite ratio. In Python that is `float("inf")`; JSON has no infinity, so `json_db` and
`StepSQNR.to_json` write None for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError

PEAK = 2.0  # the range of images, which lie in [-1, 1]


def sqnr_db(signal: npt.NDArray[Any], noisy: npt.NDArray[Any]) -> float:
    """Return the signal to quantization noise ratio, 10 log10(sum signal^2 / sum (noisy - signal)^2), over all values.

    Infinite for identical arrays, minus infinite for noise on a signal of zeros, NaN where either holds one.
    """
    return ratio_db(*_powers(signal, noisy))


def psnr_db(reference: npt.NDArray[Any], image: npt.NDArray[Any], peak: float) -> npt.NDArray[np.float64]:
    """Return the peak signal to noise ratio of images `[B, ...]`, float64 `[B]`; `peak` is the range (2 for -1..1)."""
    _same_shape(reference, image)
    if reference.ndim < 2 or not peak > 0:
        raise InputError(f"images of shape {list(reference.shape)} with peak {peak}", hint="[batch, ...], peak above 0")
    difference = image.astype(np.float64) - reference.astype(np.float64)
    errors = (difference**2).reshape(len(difference), -1).mean(axis=1)
    return np.array([ratio_db(peak**2, error) for error in errors.tolist()], dtype=np.float64)


def ssim(reference: npt.NDArray[Any], image: npt.NDArray[Any], peak: float) -> npt.NDArray[np.float64]:
    """Return the structural similarity of each image `[B, C, H, W]`, float64 `[B]`: 1 for identical ones.

    The mean over channels and all windows of 7x7 pixels (smaller where the image is), evenly weighted, with the usual
    constants (0.01 peak)^2 and (0.03 peak)^2. Audio `[B, C, L]` has windows of 7, video of 7x7x7. Values go from 0 to
    `peak`: means around 0 have no brightness to compare.
    """
    _same_shape(reference, image)
    if reference.ndim < 3 or not peak > 0:
        raise InputError(f"images of shape {list(reference.shape)} with peak {peak}", hint="[B, C, H, W], peak above 0")
    x, y = reference.astype(np.float64), image.astype(np.float64)
    size, sides = tuple(min(7, n) for n in x.shape[2:]), tuple(range(2, x.ndim))

    def mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        windows = np.lib.stride_tricks.sliding_window_view(values, size, axis=sides)
        averaged: npt.NDArray[np.float64] = windows.mean(axis=tuple(range(-len(sides), 0)))
        return averaged

    at_x, at_y = mean(x), mean(y)
    var_x, var_y, both = mean(x * x) - at_x**2, mean(y * y) - at_y**2, mean(x * y) - at_x * at_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = (2 * at_x * at_y + c1) * (2 * both + c2) / ((at_x**2 + at_y**2 + c1) * (var_x + var_y + c2))
    return np.asarray(similarity.reshape(len(similarity), -1).mean(axis=1), np.float64)


def ratio_db(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise) of two powers: infinite without noise, else minus infinite without signal."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def db_text(value: float | None, digits: int = 1) -> str:
    """Return decibels for display, without the unit. None, as from `json_db`, stands for an infinite ratio."""
    return "no error" if value is None else f"{value:.{digits}f}"


def json_db(value: float) -> float | None:
    """Return `value` for JSON: None where it is not finite."""
    return value if math.isfinite(value) else None


class StepSQNR:
    """SQNR for each step of a run, from streaming sums of squares; two of them add up to that of both their data."""

    def __init__(self) -> None:
        self._powers: dict[int, tuple[float, float]] = {}  # step -> (signal, noise)

    def add(self, step: int, ref: npt.NDArray[Any], got: npt.NDArray[Any]) -> None:
        """Add two results of one shape at a step, an index or a timestep."""
        self._merge(int(step), _powers(ref, got))

    def __add__(self, other: StepSQNR) -> StepSQNR:
        merged = StepSQNR()
        for part in (self, other):
            for step, powers in part._powers.items():
                merged._merge(step, powers)
        return merged

    def per_step(self) -> dict[int, float]:
        """Return decibels for each step, in the order of first additions."""
        return {step: ratio_db(*powers) for step, powers in self._powers.items()}

    def over(self, steps: Iterable[int]) -> StepSQNR:
        """Return the part of these steps, as far as they were added."""
        part = StepSQNR()
        for step in steps:
            if step in self._powers:
                part._merge(step, self._powers[step])
        return part

    def noise(self) -> dict[int, float]:
        """Return the sum of squares of the noise at each step."""
        return {step: noise for step, (_, noise) in self._powers.items()}

    def pooled(self) -> float:
        """Return the decibels of all steps together, where large outputs weigh more. NaN without additions."""
        signal, noise = (sum(powers[i] for powers in self._powers.values()) for i in (0, 1))
        return ratio_db(signal, noise) if self._powers else math.nan

    def worst(self) -> tuple[int, float]:
        """Return the step with the lowest ratio, and its decibels; NaN is worse than any number."""
        if not self._powers:
            raise InputError("nothing was compared yet")
        return min(self.per_step().items(), key=lambda item: -math.inf if math.isnan(item[1]) else item[1])

    def to_json(self) -> dict[str, Any]:
        """Return `{"per_step": {step: dB}, "pooled": dB, "worst": [step, dB]}`, with None for what is not finite."""
        step, db = self.worst()
        return {
            "per_step": {str(key): json_db(value) for key, value in self.per_step().items()},
            "pooled": json_db(self.pooled()),
            "worst": [step, json_db(db)],
        }

    def _merge(self, step: int, powers: tuple[float, float]) -> None:
        signal, noise = self._powers.get(step, (0.0, 0.0))
        self._powers[step] = (signal + powers[0], noise + powers[1])


def _powers(signal: npt.NDArray[Any], noisy: npt.NDArray[Any]) -> tuple[float, float]:
    _same_shape(signal, noisy)
    wanted = signal.astype(np.float64).ravel()
    noise = noisy.astype(np.float64).ravel() - wanted
    return float(wanted @ wanted), float(noise @ noise)


def _same_shape(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> None:
    # Broadcasting would compare every image with one of them and say nothing.
    if one.shape != other.shape or one.size == 0:
        raise InputError(f"arrays of shapes {list(one.shape)} and {list(other.shape)} cannot be compared")
