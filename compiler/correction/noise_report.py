"""Figures for each network call that test the noise model of the corrections, for display.

PTQD models the remaining error as Gaussian and independent of the signal. On all of the data any test rejects this:
with enough values every real distribution differs from a Gaussian. So K2 = Zskew^2 + Zkurt^2 (D'Agostino & Pearson) is
computed on random subsets of about 2000 values, together with skewness and excess kurtosis, which measure the
difference, and the correlation of the error, and of its magnitude, with the signal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime import streams
from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.steps import Step
from mezzotint.runtime.signature import CHANNELS_FIRST

SUBSET = 2048
"""The number of values of a call that are tested."""
_BATCH = 512  # at most so many of them from one batch
_ROUNDING = 1e-6  # of the largest output: a smaller error is float32 rounding

NoiseReport = dict[str, Any]


Places = npt.NDArray[np.int64]
"""Flat indices of values of an output."""


def chosen_values(exact: Floats, actual: Floats, chosen: Places, channel_axis: int) -> npt.NDArray[np.float64]:
    """Return float outputs, quantized outputs and channels `[3, chosen]` of two outputs of one shape, of any rank."""
    channels = np.unravel_index(chosen, exact.shape)[channel_axis]
    return np.stack([exact.reshape(-1)[chosen], actual.reshape(-1)[chosen], channels]).astype(np.float64)


class Residuals:
    """Random subsets of (float output, quantized output, channel) at each call: at most SUBSET values each."""

    def __init__(self, seed: int, channel_axis: int = CHANNELS_FIRST) -> None:
        self._axis = channel_axis
        self._rng = streams.RESIDUALS.generator(seed)
        self._room: dict[int, int] = {}
        self._pairs: dict[int, list[npt.NDArray[np.float64]]] = {}

    def choose(self, call: int, size: int) -> Places:
        """Return which of the `size` values of the next outputs of a call are wanted; none once there are SUBSET."""
        room = self._room.setdefault(call, SUBSET)
        if room <= 0:
            return np.zeros(0, np.int64)
        chosen = self._rng.choice(size, min(room, _BATCH, size), replace=False)
        self._room[call] -= len(chosen)
        return chosen

    def add(self, call: int, values: npt.NDArray[np.float64]) -> None:
        """Add the `chosen_values` of a call."""
        self._pairs.setdefault(call, []).append(values)

    def figures(self, call: int, correction: Correction) -> dict[str, float | None]:
        """Return figures of the corrected error; without an error, all are None.

        They are p of the normality test, skewness, excess kurtosis, and the correlation of the error, and of |error|,
        with the signal.
        """
        signal, actual, channels = np.concatenate(self._pairs[call], axis=1)
        error = actual * correction.scale[call] - correction.shift[call][channels.astype(int)] - signal
        from scipy import stats  # takes half a second, which listing recipes should not

        if len(error) < 20 or error.std() <= _ROUNDING * max(float(np.abs(signal).max()), 1e-30):
            return dict.fromkeys(("normal_p", "skewness", "kurtosis", "correlation", "magnitude_correlation"))
        return {
            "normal_p": _number(stats.normaltest(error).pvalue),
            "skewness": _number(stats.skew(error)),
            "kurtosis": _number(stats.kurtosis(error)),
            "correlation": _correlation(signal, error),
            "magnitude_correlation": _correlation(np.abs(signal), np.abs(error)),
        }


def noise_report(
    correction: Correction,
    steps: Sequence[Step],
    rows: Sequence[Mapping[str, Any]],
    residuals: Residuals,
    *,
    gate: bool,
    image_db: Mapping[str, float] | None = None,
) -> NoiseReport:
    """Return the manifest's report: one row for each network call, and a summary of one line.

    `rows` are those of NoiseFit.gated; SQNR is that of the output on held-out calls. `image_db` is the SQNR of sampled
    images with each part of the correction, dB, if it was measured.
    """
    noises, clamped = correction.noise(steps), correction.clamped(steps)
    calls = []
    for call, (step, row) in enumerate(zip(steps, rows, strict=True)):
        row = dict(row) if gate else {**row, "kept": "both", "variance_kept": step.sigma > 0}
        calls.append(
            {
                "timestep": step.timestep,
                "stage": step.stage,
                "slope": 1 / float(correction.scale[call]) - 1,
                "bias": float(np.sqrt((correction.shift[call] ** 2).mean())),
                "spread": float(correction.spread[call]),
                **row,
                "sigma": step.sigma,
                "noise": noises[call],
                "clamped": clamped[call],
                **residuals.figures(call, correction),
            }
        )
    report = merged_report(correction.form, calls, gate=gate)
    if image_db:
        best = max(image_db, key=lambda parts: image_db[parts])
        report["pictures_db"] = dict(image_db)
        report["summary"] += f"; pictures {image_db['none']:.2f} -> {image_db[best]:.2f} dB ({best})"
    return report


def merged_report(form: str, rows: Sequence[Mapping[str, Any]], *, gate: bool) -> NoiseReport:
    """Return the report of given rows; those of a mixed bundle come from several reports."""
    report: NoiseReport = {"form": form, "gate": gate, "calls": list(rows)}
    report["shares"] = _shares(rows)
    report["summary"] = _summary(report)
    return report


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean SQNR over held-out calls, dB, without a correction and with each part of it."""
    parts: tuple[str, ...] = ("none", "slope", "bias", "both")
    means = {part: [row["sqnr_db"][part] for row in rows if row["sqnr_db"][part] is not None] for part in parts}
    kept = [row["sqnr_db"][row["kept"]] for row in rows if row["sqnr_db"][row["kept"]] is not None]
    return {part: float(np.mean(values)) for part, values in {**means, "kept": kept}.items() if values}


def _summary(report: NoiseReport) -> str:
    rows, shares = report["calls"], report["shares"]
    off = sum(row["kept"] == "none" for row in rows)
    noisy = [row for row in rows if row["sigma"] > 0]
    text = f"{report['form']}: slope up to {max(abs(row['slope']) for row in rows):.4f}"
    text += f", spread up to {max(row['spread'] for row in rows):.4f}"
    if {"none", "kept"} <= set(shares):
        text += f"; held out {shares['none']:.2f} -> {shares['kept']:.2f} dB a call"
    if off and report["gate"]:
        text += f", switched off at {off} of {len(rows)} calls"
    if noisy:
        changed = sum(row["variance_kept"] for row in noisy)
        clamps = sum(row["clamped"] for row in noisy)
        text += f"; the noise of {changed} of {len(noisy)} steps changed, {clamps} clamped at 0"
    return text


def _correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float | None:
    return _number(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else None


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
