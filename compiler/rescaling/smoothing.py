"""Which factors for a layer's input channels pay: the error that quantization leaves, expected from statistics alone.

For y = (x / s)(W s), x / s on a grid of step D(s) and the rows of W s on theirs, the noise in one output position is

    E(s) = sum_k  m_k / s_k^2  ||round(W s) - W s||^2_k   +   min(D(s)^2 / 12, m_k / s_k^2)  s_k^2 ||W||^2_k

m_k is the mean square of channel k, ||.||_k the norm of what the weights do with that channel (all rows, all taps). The
first term is the weights' rounding, the second the activation's, which is no more than the channel itself: what is much
smaller than a step is rounded to zero. Channels count as uncorrelated, and so do the errors.
It is compared relative to the signal P = sum_k m_k ||W||^2_k, summed over the layers that read the value. D(s) comes
from the channels' extremes: with `timed` the mean of D^2 over the calls, else one step for all of them. Nothing raw is
kept, and a weight is read once; of its rows at most `rows` are really rounded.

Weights of 1 bit are signs with the scale of their row that is best for these m_k / s_k^2: ||round(W s) - W s||^2_k is
then the sum of (|W s| - a)^2, and a the mean of |W s| weighted by m_k / s_k^2.

Padding is not seen (its zeros have no error), nor is clipping: both versions are judged by their extremes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats

from ..core.formats import Format
from ..graph.nodes import numpy_of
from ..graph.ops import Layer
from .scaling import Factors

ROUNDED_ROWS = 256
COARSE_SHRINKS = (1.0, 0.9, 0.8, 0.7)  # of the range of a row of weights: the coarse form of choose_scales' search


class GroupedWeight:
    """The weight of one layer as `[groups, rows, channels of the group, taps]`; input channels are in group order."""

    def __init__(self, layer: Layer) -> None:
        weight = np.moveaxis(numpy_of(layer.require_weight()), layer.require_weight_axis(), 0)
        groups = layer.node.attributes["group"].as_int() if "group" in layer.node.attributes else 1
        self.array: Floats = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)

    @property
    def channels(self) -> int:
        return int(self.array.shape[0] * self.array.shape[2])

    def peaks(self) -> Factors:
        """The largest magnitude `[C]` that multiplies each input channel."""
        high, low = (end(end(self.array, axis=3), axis=1) for end in (np.max, np.min))
        return np.asarray(np.maximum(high, -low), np.float64).reshape(-1)

    def norms(self) -> Factors:
        """The sum of squares `[C]` of what multiplies each input channel."""
        return np.asarray(np.einsum("grct,grct->gc", self.array, self.array, dtype=np.float64)).reshape(-1)

    def row_blocks(self, size: int = ROUNDED_ROWS) -> Iterator[Floats]:
        """All rows, at most `size` of each group at once."""
        for first in range(0, self.array.shape[1], size):
            yield self.array[:, first : first + size]

    def some_rows(self, limit: int = ROUNDED_ROWS) -> tuple[Floats, float]:
        """Rows evenly spread over each group, a copy; and how many rows of the weight each of them stands for."""
        groups, rows = self.array.shape[:2]
        count = min(rows, max(limit // groups, 1))
        chosen = np.linspace(0, rows - 1, count).round().astype(np.int64)
        return self.array[:, chosen], rows / count


@dataclass(frozen=True)
class Widths:
    """What the plan will be: widths, whether the activations' scales know the call, whether weights are clipped."""

    weight_bits: int
    activation_bits: int
    timed: bool = True
    clipped: bool = True


class Reader:
    """What one layer does to the error of the value that it reads."""

    def __init__(self, weights: GroupedWeight, mean_squares: Factors, widths: Widths) -> None:
        self.peaks, self._norms = weights.peaks(), weights.norms()
        self._rows, self._each = weights.some_rows()
        self._mean_squares, self._widths = mean_squares, widths
        self._signal = float(mean_squares @ self._norms)

    @property
    def silent(self) -> bool:
        return self._signal <= 0

    def noise(self, factors: Factors, step_square: float) -> float:
        """E(s) / P for factors `[C]`, where the mean square of the activation's step is D^2."""
        powers = self._mean_squares / factors**2
        errors = self._signs(factors, powers) if self._widths.weight_bits == 1 else self._rounded(factors)
        rounding = float(powers @ errors)
        activation = float(np.minimum(step_square / 12 * factors**2, self._mean_squares) @ self._norms)
        return (rounding + activation) / self._signal

    def _rounded(self, factors: Factors) -> Factors:
        """The squared error `[C]` of rounding the weights times the factors, each row to its own grid."""
        groups, _, channels, _ = self._rows.shape
        rows = self._rows * factors.reshape(groups, 1, channels, 1).astype(np.float32)
        limit = np.maximum(np.abs(rows).max(axis=(2, 3), keepdims=True), np.float32(1e-30))
        qmax = np.float32(Format(self._widths.weight_bits, signed=True, symmetric=True).qmax)

        def errors(shrink: float) -> Factors:
            scale = limit * np.float32(shrink) / qmax
            error = np.clip(np.rint(rows / scale), -qmax, qmax)
            error *= scale
            error -= rows
            return np.asarray(np.einsum("grct,grct->grc", error, error, dtype=np.float64))

        least = errors(COARSE_SHRINKS[0])
        for shrink in COARSE_SHRINKS[1:] if self._widths.clipped else ():
            sums = errors(shrink)
            better = sums.sum(axis=2) < least.sum(axis=2)
            least[better] = sums[better]
        return np.asarray(least.sum(axis=1) * self._each).reshape(-1)

    def _signs(self, factors: Factors, powers: Factors) -> Factors:
        """The squared error `[C]` of the signs of the weights times the factors, each row with its own scale."""
        groups, _, channels, taps = self._rows.shape
        rows = np.abs(self._rows * factors.reshape(groups, 1, channels, 1))
        each = powers.reshape(groups, channels)
        total = np.maximum(taps * each.sum(axis=1), 1e-300)[:, None]
        scale = np.einsum("grct,gc->gr", rows, each, dtype=np.float64) / total
        error = np.square(rows - scale[:, :, None, None]).sum(axis=(1, 3))
        return np.asarray(error * self._each).reshape(-1)


class Evidence:
    """All that is known about a value and its readers: extremes `[calls, 2, C]`, mean squares `[C]`, weights."""

    def __init__(
        self, extremes: npt.NDArray[np.float64], mean_squares: Factors, readers: list[GroupedWeight], widths: Widths
    ) -> None:
        self._extremes, self._widths = extremes, widths
        self._readers = [r for r in (Reader(w, mean_squares, widths) for w in readers) if not r.silent]
        self.peaks = np.maximum(-extremes[:, 0], extremes[:, 1]).clip(0)
        self.weight_peaks = np.max([w.peaks() for w in readers], axis=0)
        self._plain: float | None = None

    @property
    def silent(self) -> bool:
        """Whether nothing flows: every channel is zero, or every weight."""
        return not self._readers

    def step_square(self, factors: Factors) -> float:
        """D(s)^2, the mean over the calls."""
        low = np.minimum((self._extremes[:, 0] / factors).min(axis=1), 0.0)
        high = np.maximum((self._extremes[:, 1] / factors).max(axis=1), 0.0)
        width = high - low if self._widths.timed else np.array([high.max() - low.min()])
        return float(np.mean(width**2)) / Format(self._widths.activation_bits).qmax ** 2

    def noise(self, factors: Factors) -> float:
        """The noise of all readers together, each relative to its own signal."""
        step_square = self.step_square(factors)
        return sum(reader.noise(factors, step_square) for reader in self._readers)

    def gain(self, factors: Factors) -> float:
        """By how many decibels the factors lower the noise."""
        if self._plain is None:
            self._plain = self.noise(np.ones(len(factors)))
        after = self.noise(factors)
        return float(10 * np.log10(max(self._plain, 1e-300) / max(after, 1e-300)))

    def best(self, candidates: Mapping[str, Factors]) -> tuple[str, Factors, float] | None:
        """(name, factors, gain) of the candidate with the largest gain, the first of equals."""
        found = [(name, factors, self.gain(factors)) for name, factors in candidates.items()]
        return max(found, key=lambda entry: entry[2], default=None)


def tamed(factors: Factors) -> Factors:
    """Factors with the geometric mean 1, which changes nothing but keeps numbers small, between 2^-12 and 2^12."""
    centred = factors / np.exp(np.mean(np.log(factors)))
    result: Factors = np.clip(centred, 2.0**-12, 2.0**12)
    return result


def powers_of_two(factors: Factors) -> Factors:
    """The nearest powers of two: with them, products and quotients of float32 are exact."""
    result: Factors = np.exp2(np.rint(np.log2(factors)))
    return result


def dilation(weights: list[GroupedWeight], *, symmetric: bool) -> Factors:
    """The largest factors that leave every row's range as it is, never below 1: the least ratio of range to weight.

    With a symmetric grid the range of a row is its largest magnitude; else positive weights may grow up to the row's
    maximum and negative ones down to its minimum. A channel that attains an end of a row has the ratio 1 there. One
    that all rows ignore has no ratio, and keeps 1.
    """
    least = np.full(weights[0].channels, np.inf)
    for weight in weights:
        for block in weight.row_blocks():
            high, low = block.max(axis=3), block.min(axis=3)  # [groups, rows, channels of the group]
            ends = [np.maximum(high, -low)] if symmetric else [np.maximum(high, 0), np.maximum(-low, 0)]
            for end in ends:
                wide = end.astype(np.float64)
                ratio = np.divide(wide.max(axis=2, keepdims=True), wide, out=np.full_like(wide, np.inf), where=wide > 0)
                least = np.minimum(least, ratio.min(axis=1).reshape(-1))
    # A hair less than the ratio, so that the product never rounds up beyond the range in float32.
    return np.where(np.isfinite(least), np.maximum(least * (1 - 1e-6), 1.0), 1.0)
