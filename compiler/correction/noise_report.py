"""Is the noise what the corrections take it for? Figures for each network call, for readers.

PTQD models what is left of the error as Gaussian and independent of the signal. On all of the data any test rejects it:
with enough values every real distribution differs from a Gaussian. So K2 = Zskew^2 + Zkurt^2 (D'Agostino & Pearson) is
computed on random subsets of about 2000 values, beside skewness and excess kurtosis, which say how far it is off, and
the correlation of the error and of its magnitude with the signal.
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

SUBSET = 2048
"""Values of a call that are tested."""
_BATCH = 512  # of them from one batch
_ROUNDING = 1e-6  # of the largest output: what is less is float32's own, not quantization

Report = dict[str, Any]


class Residuals:
    """Random subsets of (float output, quantized output, channel) at each call: at most SUBSET values each."""

    def __init__(self, seed: int) -> None:
        self._rng = streams.RESIDUALS.generator(seed)
        self._pairs: dict[int, list[npt.NDArray[np.float64]]] = {}

    def add(self, call: int, wanted: Floats, got: Floats) -> None:
        """Both outputs `[B, C, H, W]` of network call `call`."""
        known = self._pairs.setdefault(call, [])
        room = SUBSET - sum(part.shape[1] for part in known)
        if room <= 0:
            return
        chosen = self._rng.choice(wanted.size, min(room, _BATCH, wanted.size), replace=False)
        channels = np.unravel_index(chosen, wanted.shape)[1]
        known.append(np.stack([wanted.reshape(-1)[chosen], got.reshape(-1)[chosen], channels]).astype(np.float64))

    def figures(self, call: int, correction: Correction) -> dict[str, float | None]:
        """Of what the correction leaves: p of the normality test, skewness, excess kurtosis, and the correlation of the
        error, and of |error|, with the signal."""
        signal, got, channels = np.concatenate(self._pairs[call], axis=1)
        error = got * correction.scale[call] - correction.shift[call][channels.astype(int)] - signal
        from scipy import stats  # half a second that nobody should wait for who lists recipes

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
    pictures: Mapping[str, float] | None = None,
) -> Report:
    """What the manifest keeps: one row for each network call, and a summary of one line.

    `rows` are those of NoiseFit.gated; SQNR is that of the output on held-out calls. `pictures` is how near whole
    pictures come with each part of the correction, dB, where that was tried.
    """
    noises, clamped = correction.noise(steps), correction.clamped(steps)
    found = []
    for call, (step, row) in enumerate(zip(steps, rows, strict=True)):
        row = dict(row) if gate else {**row, "kept": "both", "variance_kept": step.sigma > 0}
        found.append(
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
    report = merged_report(correction.form, found, gate=gate)
    if pictures:
        best = max(pictures, key=lambda parts: pictures[parts])
        report["pictures_db"] = dict(pictures)
        report["summary"] += f"; pictures {pictures['none']:.2f} -> {pictures[best]:.2f} dB ({best})"
    return report


def merged_report(form: str, rows: Sequence[Mapping[str, Any]], *, gate: bool) -> Report:
    """The report of rows that are there already; those of a mixed bundle come from several."""
    report: Report = {"form": form, "gate": gate, "calls": list(rows)}
    report["shares"] = _shares(rows)
    report["summary"] = _summary(report)
    return report


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean SQNR over the calls, dB, without correction and with each part of it, on held-out calls."""
    parts: tuple[str, ...] = ("none", "slope", "bias", "both")
    means = {part: [row["sqnr_db"][part] for row in rows if row["sqnr_db"][part] is not None] for part in parts}
    kept = [row["sqnr_db"][row["kept"]] for row in rows if row["sqnr_db"][row["kept"]] is not None]
    return {part: float(np.mean(values)) for part, values in {**means, "kept": kept}.items() if values}


def _summary(report: Report) -> str:
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
