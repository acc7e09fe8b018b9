"""dilate_weights: weights that do not set the range of any row grow until they do, and the activations shrink.

    s_k = min over rows o of  range_o / |W[o, k]|          layer(x, W) = layer(x / s, W s)

Source: DilateQuant (arXiv 2409.14307). There the range of a row has two ends, and the ratio is taken at the maximum for
positive weights and at the minimum for negative ones; a channel that attains an end of any row keeps s = 1, which the
least ratio says as well. Weight grids here are symmetric, so the range of a row is its largest magnitude (`symmetric`,
over rows and taps alike). Denominators of zero are left out.

No row's range changes, so the weights are rounded with the same steps, and what channel k adds of that error is smaller
by s_k; the activation's range shrinks only where the loudest channel has s > 1. Where it does not, larger weights make
more of the activation's rounding error, so the factors are applied by the same expected error as those of
smooth_scales; `gain: -100` applies them everywhere, as the paper does. The paper's training is not here.

What to expect: with Co rows of random weights over Ci channels about 1 - exp(-Co / Ci) of the channels (symmetric) hold
a row's range. So this is for layers that contract. Measured on the digits at 4-bit weights, a Mul wherever 0.1 dB were
expected: s = 1.09 on average, and epsilon within 0.4 dB of what it was, to the worse; at 6 bits 4 values would gain.
With planted outliers (see smooth_scales) dilation has what it needs, weights that are small where the activation is
loud: 24.7 dB of epsilon became 25.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mezzotint.compiler.rescaling.search import ScaledInputs, Tally
from mezzotint.compiler.rescaling.smoothing import Evidence, Factors, Weights, dilation


@dataclass(frozen=True)
class DilateWeights(ScaledInputs):
    """`symmetric`: one range for each row, its largest magnitude; else two ends as in the paper."""

    symmetric: bool = True

    def candidates(self, evidence: Evidence, weights: list[Weights]) -> Mapping[str, Factors]:
        return {"dilated": dilation(weights, symmetric=self.symmetric)}

    def describe(self, tally: Tally) -> str:
        if not tally.factors:
            return ""
        every = np.concatenate(tally.factors)
        return f"{(every > 1).mean():.0%} of their channels have s > 1, {every.mean():.2f} on average"
