"""Quantization noise, measured and undone (PTQD, arXiv 2305.10657).

For each network call the error of the quantized output, D = got - wanted, is split into a part proportional to the
wanted output, a bias for each channel, and a rest:

    D = k * wanted + r,    k = Cov(D, wanted) / Var(wanted)    (least squares slope over all images, channels and
                                                                pixels; the intercept is dropped)
    corrected = got / (1 + k) - E[r_c] / (1 + k)               (the paper's order: divide, then subtract)

What remains is treated as Gaussian with standard deviation `spread` and taken out of the sampler's own noise, see
steps.py. `NoiseFit` measures, `Correction` is the result. Everything concerns the raw output of the network,
whatever it predicts; with guidance, the combined output. Rows are keyed by the raw timestep, never by a position: a
table that is read in the wrong direction gives plausible images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .errors import BundleError, InputError, TimestepNotDeployed
from .schedule import Deployment

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
_METADATA_KEY = "mezzotint"


@dataclass(frozen=True, eq=False)
class Correction:
    """One row for each call of one deployment; valid for exactly that sampler, its steps and eta.

    timesteps int64 `[T]`; slope k float64 `[T]`; bias float64 `[T, C]`, what is subtracted after dividing by 1 + k;
    spread float64 `[T]`, the standard deviation of what then remains.
    """

    timesteps: npt.NDArray[np.int64]
    slope: Doubles
    bias: Doubles
    spread: Doubles
    sampler: str
    steps: int
    eta: float
    rows: Mapping[int, int] = field(init=False, repr=False)  # timestep -> row
    _scale: Floats = field(init=False, repr=False)
    _shift: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.timesteps)
        shapes = self.slope.shape, self.bias.shape[:1], self.spread.shape
        if self.bias.ndim != 2 or any(shape != (count,) for shape in shapes):
            raise InputError(f"correction tables of different lengths: {count} timesteps, {shapes}")
        numbers = (self.slope, self.bias, self.spread)
        if not all(np.all(np.isfinite(table)) for table in numbers) or np.any(self.spread < 0):
            raise InputError("correction tables hold values that are not finite, or a negative spread")
        if np.any(self.slope <= -1):
            # 1 + k is what is left of the signal; at 0 there is nothing to divide by.
            raise InputError(
                f"the quantized output does not follow the float one at timestep {self.timesteps[self.slope.argmin()]}",
                hint="quantize less, or with better scales; no correction can repair this",
            )
        rows = {int(t): row for row, t in enumerate(self.timesteps)}
        if len(rows) != count:
            raise InputError("a correction has two rows for one timestep")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "_scale", (1 / (1 + self.slope)).astype(np.float32))
        object.__setattr__(self, "_shift", self.bias.astype(np.float32)[:, :, None, None])

    @property
    def fitted_for(self) -> str:
        """For messages: the one way of sampling that these tables are valid for."""
        return f"{self.sampler}, {self.steps} steps, eta {self.eta:g}"

    def valid_for(self, sampler: str, steps: int, eta: float) -> bool:
        """Whether the tables were fitted for this way of sampling."""
        return (self.sampler, self.steps, self.eta) == (sampler, steps, eta)

    def apply(self, output: Floats, t: int) -> Floats:
        """The raw output `[B, C, H, W]` of timestep `t`, corrected: a new float32 array."""
        row = self._row(t)
        if output.ndim != 4 or output.shape[1] != self.bias.shape[1]:
            raise InputError(f"output of shape {list(output.shape)}, the correction has {self.bias.shape[1]} channels")
        fixed: Floats = output * self._scale[row]
        fixed -= self._shift[row]
        return fixed

    def spread_at(self, t: int) -> float:
        """Standard deviation of the error that is left in the corrected output of timestep `t`."""
        return float(self.spread[self._row(t)])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the same tables give the same bytes."""
        tables = {"timesteps": self.timesteps, "slope": self.slope, "bias": self.bias, "spread": self.spread}
        facts = {"sampler": self.sampler, "steps": self.steps, "eta": self.eta}
        # One metadata entry only: safetensors writes several in a random order.
        save_file({k: np.ascontiguousarray(v) for k, v in tables.items()}, path, {_METADATA_KEY: json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> Correction:
        """Read what `save` wrote. Raises BundleError where it is something else."""
        try:
            with safe_open(path, framework="numpy") as file:
                facts: dict[str, Any] = json.loads((file.metadata() or {})[_METADATA_KEY])
                tables = {name: file.get_tensor(name) for name in ("timesteps", "slope", "bias", "spread")}
            return cls(**tables, sampler=str(facts["sampler"]), steps=int(facts["steps"]), eta=float(facts["eta"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, InputError) as error:
            raise BundleError(f"not a table of corrections: {error}", where=str(path)) from error

    def _row(self, t: int) -> int:
        row = self.rows.get(int(t))
        if row is None:
            raise TimestepNotDeployed(
                f"the correction has no row for timestep {t}", hint=f"it was fitted for {self.fitted_for}"
            )
        return row


@dataclass(frozen=True)
class _Sums:
    """Sums over images and pixels of one timestep, for each channel, of the wanted output w and the error d."""

    count: float
    table: Doubles  # [5, C]: w, d, w*w, w*d, d*d

    def __add__(self, other: _Sums) -> _Sums:
        if self.table.shape != other.table.shape:
            raise InputError(f"{self.table.shape[1]} and {other.table.shape[1]} channels cannot be merged")
        return _Sums(self.count + other.count, self.table + other.table)

    @classmethod
    def of(cls, wanted: Floats, got: Floats) -> _Sums:
        w = wanted.astype(np.float64)
        d = got.astype(np.float64) - w
        products = [np.einsum("bchw,bchw->c", a, b) for a, b in ((w, w), (w, d), (d, d))]
        return cls(w.size / w.shape[1], np.stack([w.sum((0, 2, 3)), d.sum((0, 2, 3)), *products]))

    def slope(self) -> float:
        """Cov(D, wanted) / Var(wanted), all channels pooled; 0 where the wanted output is constant."""
        w, d, ww, wd, _ = self.table.mean(axis=1) / self.count
        variance = ww - w * w
        return float((wd - w * d) / variance) if variance > 1e-12 * ww else 0.0

    def residual(self, slope: float) -> tuple[Doubles, float]:
        """Mean `[C]` of the error beyond the proportional part, and the pooled standard deviation around that mean."""
        w, d, ww, wd, dd = self.table / self.count
        mean = d - slope * w
        square = dd - 2 * slope * wd + slope**2 * ww
        return mean, float(np.sqrt(np.maximum(square - mean**2, 0).mean()))


class NoiseFit:
    """Streaming sums of float beside quantized outputs, for each timestep; nothing raw is kept.

    Two fits add up to the fit of both their data, so that fitting can be spread over machines, stop and resume.
    """

    def __init__(self) -> None:
        self._sums: dict[int, _Sums] = {}

    @property
    def timesteps(self) -> tuple[int, ...]:
        """What has been measured, rising."""
        return tuple(sorted(self._sums))

    def add(self, t: int, float_output: Floats, quantized_output: Floats) -> None:
        """Both outputs `[B, C, H, W]`, for the same state x at timestep `t`."""
        if float_output.shape != quantized_output.shape or float_output.ndim != 4 or float_output.size == 0:
            raise InputError(
                f"outputs of shapes {list(float_output.shape)} and {list(quantized_output.shape)} at timestep {t}",
                hint="both must be [batch, channels, height, width], of the same inputs",
            )
        self._merge(int(t), _Sums.of(float_output, quantized_output))

    def __add__(self, other: NoiseFit) -> NoiseFit:
        merged = NoiseFit()
        for fit in (self, other):
            for t, sums in fit._sums.items():
                merged._merge(t, sums)
        return merged

    def stages(self, t: int) -> dict[str, float]:
        """Mean square of the error at `t` as it comes (`error`), and with the slope, then also the bias, taken away.

        `wanted` is the mean square of the float output, to which the others compare.
        """
        sums = self._of(t)
        mean, spread = sums.residual(sums.slope())
        rest = spread**2
        wanted, error = (sums.table[[2, 4]] / sums.count).mean(axis=1)
        return {
            "wanted": float(wanted),
            "error": float(error),
            "without_slope": rest + float((mean**2).mean()),
            "without_slope_and_bias": rest,
        }

    def correction(self, deployment: Deployment) -> Correction:
        """The tables for `deployment`, one row for each of its calls. Raises InputError where one was not measured."""
        missing = [t for t in deployment.timesteps if t not in self._sums]
        if missing:
            raise InputError(
                f"no error was measured at timesteps {missing[:4]} ({len(missing)} of {deployment.steps} are missing)",
                hint="fit the noise with the deployed sampler and its steps",
            )
        found = [self._of(t) for t in deployment.timesteps]
        slopes = np.array([sums.slope() for sums in found])
        residuals = [sums.residual(slope) for sums, slope in zip(found, slopes.tolist(), strict=True)]
        if len({mean.shape for mean, _ in residuals}) > 1:
            raise InputError("the network has different numbers of channels at different timesteps")
        return Correction(
            timesteps=np.array(deployment.timesteps, dtype=np.int64),
            slope=slopes,
            bias=np.stack([mean for mean, _ in residuals]) / (1 + slopes)[:, None],
            spread=np.array([spread for _, spread in residuals]) / np.abs(1 + slopes),
            sampler=deployment.sampler,
            steps=deployment.steps,
            eta=deployment.eta,
        )

    def _of(self, t: int) -> _Sums:
        if t not in self._sums:
            raise InputError(f"no error was measured at timestep {t}")
        return self._sums[t]

    def _merge(self, t: int, sums: _Sums) -> None:
        self._sums[t] = self._sums[t] + sums if t in self._sums else sums
