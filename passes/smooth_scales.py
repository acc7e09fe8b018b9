"""smooth_scales: move the difficulty of quantizing activations into the weights, channel by channel.

    s_k = amax_k^alpha / wmax_k^(1 - alpha)          layer(x, W) = layer(x / s, W s)

amax_k is the largest magnitude of channel k over the calls of the whole deployment (`max`), or the mean of the calls'
largest magnitudes (`mean`). wmax_k is the largest magnitude of the weights that multiply it, in all layers that read
the value. alpha = 1 gives all channels the same range, alpha = 0 all columns of the weights. With `form` log the one
candidate is s_k = amax_k / log2(2 + amax_k), amax_k relative to the mean over the channels, as in FPTQ (arXiv
2308.15987): loud channels are brought down to the logarithm of what they were, and the others hardly move. With `form`
signs it is s_k = 1 / b_k, where a b^T is the best approximation of rank 1 of |W|, as in OneBit (arXiv 2402.11295;
compiler/rescaling/rank_one.py): W s has rows of nearly one magnitude, the best that weights of 1 bit can have.

Sources: SmoothQuant (arXiv 2211.10438), with one alpha for the whole model; DiTAS (arXiv 2409.07756), which takes the
maxima over all steps of the sampler and searches alpha for each layer; the first step of SVDQuant (arXiv 2411.05007) is
the same search. Deviations: alpha is chosen by the expected error (compiler/rescaling/smoothing.py) and not by running
the layer on stored activations. No smoothing is always a candidate. Layers that read one value share the factors and so
the search. More kinds of producers take the factors (compiler/rescaling). Where none can take them exactly - SiLU in
front of the convolutions of a residual block - DiTAS and MPQ-DM (arXiv 2412.11549) multiply at run time; here
`run_time` does so where that is expected to pay.

Measured on the digits (w8a8-steps, with 4-bit weights): nine of the 43 values have a producer that takes factors, and
none of those gains. Muls at run time for all values that are expected to gain 0.1 dB bring 0.5 dB of epsilon (17 Muls),
0.2 dB at 6 bits (36) and 0.3 dB at 8 bits (27, and nine values without a Mul). On a busy machine they took 2 to 13 %
more time: hence `run_time_gain`. With outliers of 30 times planted in 5 % of the channels of those nine values, epsilon
is 24.7 dB unsmoothed and 25.3 dB smoothed, and the images go from 19.7 to 23.9 dB. As w8a8-best has it (exact places
that gain 3 dB), it changes nothing on digits and mnist-onnx, with weights of 8 or 4 bits: the images are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.rescaling.rank_one import input_vector
from mezzotint.compiler.rescaling.scaling import Factors
from mezzotint.compiler.rescaling.search import ScaledInputs, Tally
from mezzotint.compiler.rescaling.smoothing import Evidence, GroupedWeight, powers_of_two, tamed

GRID = tuple(round(i / 10, 1) for i in range(11))
FLOOR = 1e-5  # of the loudest channel: a silent one would get the factor 0


@dataclass(frozen=True)
class SmoothScales(ScaledInputs):
    """Smoothing factors; the other options are those of ScaledInputs (compiler/rescaling/search.py).

    - `alphas`: the values that are tried for each activation; one number serves all of them.
    - `aggregate`: `max` or `mean`, and `form`: `power` of alphas, `log` or `signs`, as above.
    - `power_of_two`: round the factors to powers of two, so that x / s and W s are exact in float32.
    """

    alphas: tuple[float, ...] | float = GRID
    aggregate: Literal["max", "mean"] = "max"
    power_of_two: bool = False
    form: Literal["power", "log", "signs"] = "power"

    def __post_init__(self) -> None:
        if not self._alphas or not all(0 <= alpha <= 1 for alpha in self._alphas):
            raise RecipeError(
                f"smooth_scales.alphas is {self.alphas}",
                where=self.name,
                hint="choose numbers between 0 (even weights) and 1 (even activations)",
            )

    @property
    def _alphas(self) -> tuple[float, ...]:
        return (self.alphas,) if isinstance(self.alphas, (int, float)) else tuple(self.alphas)

    def candidates(self, evidence: Evidence, weights: list[GroupedWeight]) -> Mapping[str, Factors]:
        together = np.max if self.aggregate == "max" else np.mean
        loud = _floored(together(evidence.peaks, axis=0))
        heavy = _floored(evidence.weight_peaks)
        if self.form == "signs":
            candidates = {"1": tamed(1 / input_vector(weights))}
        elif self.form == "log":
            candidates = {"1": tamed(loud / np.log2(2 + loud / loud.mean()))}
        else:
            candidates = {f"{alpha:g}": tamed(loud**alpha / heavy ** (1 - alpha)) for alpha in self._alphas}
        return {name: powers_of_two(s) for name, s in candidates.items()} if self.power_of_two else candidates

    def describe(self, tally: Tally) -> str:
        if self.form != "power":
            words = {"log": "logarithmic factors", "signs": "factors of rank 1"}
            return words[self.form] if tally.choices else ""
        return f"alpha {np.median([float(c) for c in tally.choices]):g} in the middle" if tally.choices else ""


def _floored(peaks: Factors) -> Factors:
    return np.maximum(peaks, FLOOR * max(float(peaks.max()), 1e-30))
