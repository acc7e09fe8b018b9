"""The measured quantization noise of each prediction: float output w and quantized output q for the same x.

Only sums are kept, for each network call and channel, over images and pixels; they suffice for every form of correction
and for its quality on other images. correction.py applies it. d = q - w.

    regression      D2-DPM's deterministic form: a = Cov(w, q) / Var(q), corrected = a q - b_c with the mean of w_c.
                    No values are dropped as outliers.
    ptqd            the paper: k = Cov(d, w) / Var(w) over all images, channels and pixels, the intercept dropped;
                    corrected = q / (1 + k) - E[r_c] / (1 + k),  r = d - k w.  The rest counts as independent noise.
    ptqd-released   the code: k+ = max(k, 0), corrected = (q - E[d_c]) / (1 + k+). It equals the paper's form only where
                    the channels of w have mean 0; the released DDIM step differs too (`Correction.redirected`).

In PTQD the error adds its variance times the squared gain of the step to the next state. The regression measures this
on the states themselves (`StateFit`), because clipping the predicted image removes much of the error.

`gated` compares on held-out images: each call keeps the slope, the bias, both or neither, whichever leaves the least
error. Noise is subtracted from the sampler's only where the error really adds variance to the next state: an error that
is correlated with the image reduces the variance, and white noise does not restore that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays import Doubles, Floats
from ..compare import json_db, ratio_db
from ..errors import InputError
from ..signature import CHANNELS_FIRST
from .correction import FORMS, Correction
from .deployment import Deployment
from .steps import Step

PARTS = ("none", "slope", "bias", "both")
"""The parts of the output's correction that a call may keep."""
_W, _D, _WW, _WD, _DD = range(5)


@dataclass(frozen=True)
class _Sums:
    """Sums over images and pixels of one call, `[5, C]`: of w, d and their products. `count` values a channel."""

    count: float
    table: Doubles

    def __add__(self, other: _Sums) -> _Sums:
        if self.table.shape != other.table.shape:
            raise InputError(f"{self.table.shape[1]} and {other.table.shape[1]} channels cannot be merged")
        return _Sums(self.count + other.count, self.table + other.table)

    @classmethod
    def of(cls, wanted: Floats, got: Floats, axis: int) -> _Sums:
        w = wanted.astype(np.float64)
        d = got.astype(np.float64) - w
        w, d = (np.moveaxis(a, axis, 1).reshape(len(a), a.shape[axis], -1) for a in (w, d))
        products = [np.einsum("bcn,bcn->c", a, b) for a, b in ((w, w), (w, d), (d, d))]
        return cls(w.size / w.shape[1], np.stack([w.sum((0, 2)), d.sum((0, 2)), *products]))

    @property
    def means(self) -> Doubles:
        return self.table / self.count

    def covariance(self, a: int, b: int, product: int) -> float:
        """Return the covariance of two quantities within their channels, averaged over the channels."""
        m = self.means
        return float((m[product] - m[a] * m[b]).mean())

    def fit(self, form: str) -> tuple[float, Doubles]:
        """Return (scale, shift `[C]`) of a form."""
        m = self.means
        if form == "regression":
            ww, wd, dd = (self.covariance(*of) for of in ((_W, _W, _WW), (_W, _D, _WD), (_D, _D, _DD)))
            variance = ww + 2 * wd + dd
            scale = (ww + wd) / variance if variance > 1e-12 * float(m[_WW].mean()) else 1.0
            return scale, scale * (m[_W] + m[_D]) - m[_W]
        w, d, ww, wd = (float(m[i].mean()) for i in (_W, _D, _WW, _WD))
        variance = ww - w * w
        slope = (wd - w * d) / variance if variance > 1e-12 * ww else 0.0
        if form == "ptqd-released":
            slope = max(slope, 0.0)
            return 1 / (1 + slope), m[_D] / (1 + slope)
        if slope <= -1:
            raise InputError(
                f"the quantized output does not follow the float one: slope {slope:.2f}",
                hint="quantize less, or with better scales; no correction can repair this",
            )
        return 1 / (1 + slope), (m[_D] - slope * m[_W]) / (1 + slope)

    def error(self, scale: float, shift: Doubles) -> tuple[float, float]:
        """Return (mean square, variance within channels) of the remaining error scale q - shift - w."""
        m, a = self.means, scale - 1
        mean = a * m[_W] + scale * m[_D] - shift
        square = a * a * m[_WW] + 2 * a * scale * m[_WD] + scale**2 * m[_DD]
        square = square - 2 * shift * (a * m[_W] + scale * m[_D]) + shift**2
        return max(0.0, float(square.mean())), max(0.0, float((square - mean**2).mean()))


class NoiseFit:
    """Streaming sums for each network call; nothing raw is kept.

    Two fits add up to the fit of both their data, so that fitting can be spread over machines, stop and resume.
    `channel_axis` is the axis of the outputs' channels.
    """

    def __init__(self, channel_axis: int = CHANNELS_FIRST) -> None:
        self._sums: dict[int, _Sums] = {}
        self._axis = channel_axis

    @property
    def calls(self) -> tuple[int, ...]:
        """The measured network calls, rising."""
        return tuple(sorted(self._sums))

    def add(self, call: int, float_output: Floats, quantized_output: Floats) -> None:
        """Add both outputs, of any rank, for the same x, at network call `call`."""
        fits = float_output.shape == quantized_output.shape and float_output.ndim > self._axis
        if not fits or float_output.size == 0:
            raise InputError(
                f"outputs of shapes {list(float_output.shape)} and {list(quantized_output.shape)} at call {call}",
                hint=f"both must have the same shape, with channels along axis {self._axis}",
            )
        self._merge(int(call), _Sums.of(float_output, quantized_output, self._axis))

    def __add__(self, other: NoiseFit) -> NoiseFit:
        if self._axis != other._axis:
            raise InputError("fits of channels along different axes cannot be merged")
        merged = NoiseFit(self._axis)
        for part in (self, other):
            for call, sums in part._sums.items():
                merged._merge(call, sums)
        return merged

    def correction(
        self, deployment: Deployment, steps: Sequence[Step], prediction: str, form: str = "regression"
    ) -> Correction:
        """Return tables for the deployment's calls, from all sums. Raises InputError for calls without measurements."""
        if form not in FORMS:
            raise InputError(f"no form of correction is called {form!r}", hint=f"use one of {', '.join(FORMS)}")
        fits = [self._of(call, len(steps)).fit(form) for call in range(len(steps))]
        return self._tables(deployment, steps, prediction, form, fits)

    def gated(
        self,
        correction: Correction,
        steps: Sequence[Step],
        held_out: NoiseFit,
        states: StateFit,
        allowed: Collection[str] = PARTS,
    ) -> tuple[Correction, list[Row]]:
        """Return the parts of these tables that help on held-out images, and a row of figures for each call.

        `states` are held out as well, and were made with `correction`. Of PARTS only those `allowed` are considered.
        """
        fits: list[tuple[float, Doubles]] = []
        rows: list[Row] = []
        for call in range(len(steps)):
            mine, other = self._of(call, len(steps)), held_out._of(call, len(steps))
            scale, shift = float(correction.scale[call]), correction.shift[call]
            zero = np.zeros_like(shift)
            parts = {"none": (1.0, zero), "slope": (scale, zero), "bias": (1.0, mine.means[_D]), "both": (scale, shift)}
            left = {name: other.error(*part)[0] for name, part in parts.items()}
            kept = min((name for name in PARTS if name in allowed), key=lambda name: left[name])
            fits.append(parts[kept])
            power = float(other.means[_WW].mean())
            rows.append(
                {"kept": kept, "sqnr_db": {name: json_db(ratio_db(power, error)) for name, error in left.items()}}
            )
        found = self._tables(correction.deployment, steps, correction.prediction, correction.form, fits)
        excess = correction.excess.copy()
        for call, step in enumerate(steps):
            taken, added = step.gain**2 * float(excess[call]), states.added(call)
            # Without the slope it would be the variance of an output that is not used.
            pays = step.sigma > 0 and abs(added - taken) < abs(added) and rows[call]["kept"] in ("slope", "both")
            excess[call] *= pays
            rows[call].update(variance_kept=pays, variance_taken=taken, variance_added=added)
        return replace(found, excess=excess), rows

    def _tables(
        self,
        deployment: Deployment,
        steps: Sequence[Step],
        prediction: str,
        form: str,
        fits: Sequence[tuple[float, Doubles]],
    ) -> Correction:
        if len({len(shift) for _, shift in fits}) > 1:
            raise InputError("the network has different numbers of channels at different calls")
        sums = [self._of(call, len(steps)) for call in range(len(steps))]
        spread = np.array([math.sqrt(one.error(*fit)[1]) for one, fit in zip(sums, fits, strict=True)])
        return Correction(
            deployment,
            prediction,
            form,
            stages=np.array([step.stage for step in steps], np.int64),
            scale=np.array([scale for scale, _ in fits]),
            shift=np.stack([shift for _, shift in fits]),
            excess=spread**2,
            spread=spread,
            channel_axis=self._axis,
        )

    def _of(self, call: int, calls: int) -> _Sums:
        if call not in self._sums:
            missing = sum(1 for k in range(calls) if k not in self._sums)
            raise InputError(
                f"no error was measured at network call {call} ({missing} of {calls} are missing)",
                hint="fit the noise with the deployed sampler and its steps",
            )
        return self._sums[call]

    def _merge(self, call: int, sums: _Sums) -> None:
        self._sums[call] = self._sums[call] + sums if call in self._sums else sums


class StateFit:
    """Streaming sums over the state x' after each network call: the effect of the corrected error on it."""

    def __init__(self) -> None:
        self._sums: dict[int, Doubles] = {}

    def add(self, call: int, float_state: Floats, corrected_state: Floats) -> None:
        """Add x' `[B, ...]`, without the sampler's noise, from the float output and from the corrected one."""
        f = float_state.astype(np.float64).ravel()
        g = corrected_state.astype(np.float64).ravel() - f
        self._merge(call, np.array([f.size, f.sum(), g.sum(), f @ g, g @ g]))

    def __add__(self, other: StateFit) -> StateFit:
        merged = StateFit()
        for part in (self, other):
            for call, sums in part._sums.items():
                merged._merge(call, sums)
        return merged

    def _merge(self, call: int, sums: Doubles) -> None:
        self._sums[call] = self._sums[call] + sums if call in self._sums else sums

    def moved(self, call: int) -> float:
        """Return the variance that the error adds to x'."""
        count, _, g, _, gg = self._of(call)
        return max(0.0, gg / count - (g / count) ** 2)

    def added(self, call: int) -> float:
        """Return the variance of x' minus that of the float network's; below 0 where contrast was lost."""
        count, f, g, fg, _ = self._of(call)
        return self.moved(call) + 2 * (fg / count - f * g / count**2)

    def measured(self, correction: Correction, steps: Sequence[Step]) -> Correction:
        """Return the correction with the measured excess, per squared gain, instead of the output's variance."""
        gains = [step.gain**2 for step in steps]
        excess = [self.moved(call) / gain if gain > 0 else 0.0 for call, gain in enumerate(gains)]
        return replace(correction, excess=np.array(excess))

    def _of(self, call: int) -> list[float]:
        if call not in self._sums:
            raise InputError(f"no state was measured behind network call {call}")
        found: list[float] = self._sums[call].tolist()
        return found


Row = dict[str, Any]
