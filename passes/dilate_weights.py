"""dilate_weights: enlarge weight columns up to the range of their rows, and shrink the activations by as much.

    s_k = min over rows o of  range_o / |W[o, k]|          layer(x, W) = layer(x / s, W s)

Source: DilateQuant (arXiv 2409.14307). There the range of a row has two ends, and the ratio is taken at the maximum for
positive weights and at the minimum for negative ones. A channel that attains an end of any row keeps s = 1, which the
minimum above implies as well. Weight grids here are symmetric, so the range of a row is its largest magnitude
(`symmetric`, over rows and taps). Weights of 0 are left out of the minimum.

No row's range changes, so the weights are rounded with the same steps, and the error that channel k adds falls by s_k.
The activation's range shrinks only if its loudest channel has s > 1. Otherwise larger weights amplify the activation's
rounding error, so the factors are applied only where the expected error falls, as in smooth_scales; `gain: -100`
applies them everywhere, as in the paper. The paper's training is left out.

What to expect: with Co rows of random weights over Ci channels, about 1 - exp(-Co / Ci) of the channels (symmetric)
attain a row's range. So the pass suits layers with fewer outputs than inputs. Measured on the digits at 4-bit weights,
with a Mul wherever 0.1 dB are expected: s = 1.09 on average, and epsilon up to 0.4 dB worse; at 6 bits 4 values would
gain. With planted outliers (see smooth_scales), where weights are small in loud channels, epsilon goes from 24.7 to
25.4 dB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mezzotint.compiler.rescaling.scaling import Factors
from mezzotint.compiler.rescaling.search import ScaledInputs, Tally
from mezzotint.compiler.rescaling.smoothing import Evidence, GroupedWeight, dilation


@dataclass(frozen=True)
class DilateWeights(ScaledInputs):
    """Dilated weight columns; the other options are those of ScaledInputs (compiler/rescaling/search.py).

    - `symmetric`: one range for each row, its largest magnitude; otherwise two ends, as in the paper.
    """

    symmetric: bool = True

    def candidates(self, evidence: Evidence, weights: list[GroupedWeight]) -> Mapping[str, Factors]:
        return {"dilated": dilation(weights, symmetric=self.symmetric)}

    def describe(self, tally: Tally) -> str:
        if not tally.factors:
            return ""
        every = np.concatenate(tally.factors)
        return f"{(every > 1).mean():.0%} of their channels have s > 1, {every.mean():.2f} on average"
