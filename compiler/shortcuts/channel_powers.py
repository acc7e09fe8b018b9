"""Powers of two for the input channels of a layer, as DMQ divides skip connections (arXiv 2507.12933).

Channel c is divided by f_c = 2^k_c in front of the layer, and the columns of the weight that read it are multiplied.
Loud channels then no longer set the step for quiet ones, but their columns may set the scale of the weight's rows. The
expected error of one output value weighs both against each other. At network call t, with channels of the range r_tc
and the mean square q_tc, a step s_t = max_c(r_tc / f_c) / levels, weights W_nc of K taps and rows of the scale
w_n = max_c(f_c |W_nc|) / top,

    E_t  =  sum_c  min((s_t f_c)^2 / 12, q_tc) |W_c|^2 / N  +  q_tc sum_n K min((w_n / f_c)^2, w^2) / 12 N

and an error counts relative to the power of the output at its call. The second term, of the weights, is the same error
at every call: along the trajectory it adds up in amplitude, the first only in power. So candidates are compared with
the second term times the number of calls (segment_errors.py has the measurement).

The candidates even out the ranges to a share a of their exponents, k_c = ceil(a log2(r_c) + b) with r_c the largest
range of the calls. DMQ takes the exponent that most samples vote for; here the candidate of the least expected error is
taken, which includes the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mezzotint.runtime.arrays import Doubles

from ..core.formats import Format

SHARES = (0.25, 0.5, 0.75, 1.0)
OFFSETS = (0.0, 0.25, 0.5, 0.75)  # of the rounding of exponents, in octaves
_OCTAVES = 8  # exponents lie this far up and down


@dataclass(frozen=True, eq=False)
class ChannelErrors:
    """The expected error of a layer for factors of its input channels.

    `low`, `high`, `square`: the extremes and the mean square of each channel at each call `[calls, C]`; `power`: the
    mean square of the output `[calls]`; `columns`: the weight `[N, C, taps]`.
    """

    low: Doubles
    high: Doubles
    square: Doubles
    power: Doubles
    columns: Doubles
    activations: Format
    weights: Format

    def of(self, exponents: Doubles, calls: int = 1) -> float:
        """Return the mean over the calls of the squared error, relative to the power of the output.

        The error of the weights counts `calls` times.
        """
        factors = 2.0**exponents
        levels = self.activations.qmax - self.activations.qmin
        ends = np.minimum(self.low, 0) / factors, np.maximum(self.high, 0) / factors
        step = (ends[1].max(axis=1) - ends[0].min(axis=1)) / levels
        outputs = len(self.columns)
        moved = np.minimum((step[:, None] * factors) ** 2 / 12, self.square)
        rounding = moved @ np.square(self.columns).sum(axis=(0, 2)) / outputs
        largest = np.abs(self.columns).max(axis=2)
        scale = (largest * factors).max(axis=1) / self.weights.qmax
        lost = np.minimum((scale[:, None] / factors) ** 2 / 12, np.square(self.columns).mean(axis=2))
        rounding = rounding + calls * (self.square @ (lost.sum(axis=0) * self.columns.shape[2])) / outputs
        return float(np.mean(rounding / self.power))

    def best(self, *others: Doubles) -> Doubles:
        """Return the exponents of the least error over all calls: of a candidate, one of the `others`, or zeros."""
        candidates = [np.zeros(self.columns.shape[1]), *others, *self._candidates()]
        return min(candidates, key=lambda exponents: self.of(exponents, len(self.power)))

    def _candidates(self) -> Iterator[Doubles]:
        largest = np.maximum(self.high, -self.low).max(axis=0)
        octaves = np.log2(np.maximum(largest, largest.max() * 2.0**-_OCTAVES).clip(1e-30))
        octaves -= np.median(octaves)
        for share in SHARES:
            for offset in OFFSETS:
                yield np.clip(np.ceil(share * octaves + offset), -_OCTAVES, _OCTAVES)
