"""Ranges of activations from summaries: the methods shared by all passes that choose activation scales.

minmax      the measured extremes
percentile  the values between which `percentile` of the mass lies, symmetric in probability
mse         the range [a low, a high], a in 1 .. 0.2, with the least expected squared error
            E = sum_inside min(s^2 / 12, bin) + sum_outside (distance to the range)^2
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..core.formats import Format
from ..core.stats import Summary
from ..errors import RecipeError

RangeMethod = Literal["minmax", "percentile", "mse"]
RANGE_SHRINKS = np.linspace(1.0, 0.2, 81)


def check_percentile(percentile: float, where: str) -> None:
    """Raise RecipeError for a percentile option outside of 50 (exclusive) to 100."""
    if not 50 < percentile <= 100:
        raise RecipeError(
            f"{where}.percentile is {percentile}", where=where, hint="choose between 50 and 100, such as 99.999"
        )


def range_of(summary: Summary, method: RangeMethod, percentile: float, fmt: Format) -> tuple[float, float]:
    """Return (low, high) of a summary by one of the methods; `percentile` is in percent."""
    if method == "minmax":
        return summary.low, summary.high
    if method == "percentile":
        tail = (1 - percentile / 100) / 2
        return summary.percentile(tail), summary.percentile(1 - tail)
    return least_error_range(summary, fmt)


def least_error_range(summary: Summary, fmt: Format) -> tuple[float, float]:
    """Return the shrunk range with the least expected squared quantization error over a summary."""
    bottom, top = min(summary.low, 0.0), max(summary.high, 0.0)
    best, best_error = (bottom, top), np.inf
    for shrink in RANGE_SHRINKS:
        candidate = (bottom * shrink, top * shrink)
        error = expected_error(summary, *candidate, fmt)
        if error < best_error:
            best, best_error = candidate, error
    return best


def expected_error(summary: Summary, low: float, high: float, fmt: Format) -> float:
    """Return the mean squared error of quantizing the values of a summary with the range [low, high].

    A symmetric grid reaches as far on the other side.
    """
    if fmt.symmetric:
        low, high = -max(-low, high), max(-low, high)
    low_edges, high_edges, counts = summary.bins()
    centre, width = (low_edges + high_edges) / 2, high_edges - low_edges
    step = max((high - low) / (fmt.qmax - fmt.qmin), 1e-30)
    # A bin narrower than a step has one position on the grid; a wider one averages over the whole sawtooth.
    inside = np.where(width < step, (centre - step * np.rint(centre / step)) ** 2 + width**2 / 12, step**2 / 12)
    outside = np.maximum(low - centre, 0) + np.maximum(centre - high, 0)
    error = np.where(outside > 0, outside**2, np.minimum(inside, step**2 / 4))
    return float(np.sum(counts * error) / max(summary.count, 1))
