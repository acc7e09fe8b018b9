"""Quantization noise, undone while sampling (PTQD, arXiv 2305.10657; D2-DPM).

At each network call the quantized output q replaces the float output w. Their measured difference (noise_fit.py) is
undone in two places.

The output, before the solver sees it: `corrected = scale * q - shift_c`, one scale a call, one shift a channel. Both
methods have this form: PTQD divides by 1 + k and subtracts a bias, D2-DPM regresses w on q. It applies to the raw
output of the network, for any prediction type; with guidance, to the combined output.

The sampler's own noise. Between two calls every solver has x' = A x + B w + (remembered arrays) + sigma z. The error
that remains in w adds noise of variance B^2 excess to x', and this is subtracted from sigma^2:

    noise^2 = max(0, sigma^2 - B^2 excess)

A step without noise (sigma 0: DDIM with eta 0, Euler, Heun ...) has nothing to subtract from; where the error outweighs
sigma the step becomes deterministic (`clamped`).

Rows belong to network calls by position. They also have the timestep, so that a table in the wrong order is detected.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..arrays import Doubles, Floats
from ..errors import BundleError, InputError, InterpolatedCorrection, ScheduleError, TimestepNotDeployed
from ..json_text import parse_json
from ..signature import CHANNELS_FIRST
from .deployment import Deployment
from .steps import Solver, Step

FORMS = ("regression", "ptqd", "ptqd-released")
_METADATA_KEY = "mezzotint"
_TABLES = ("scale", "shift", "excess", "spread")


@dataclass(frozen=True, eq=False)
class Correction:
    """One row for each call of one deployment; valid for exactly that sampler, eta, guidance and prediction.

    scale, excess, spread float64 `[T]`, shift float64 `[T, C]`, stages int64 `[T]` (steps.py). `spread` is the standard
    deviation of the error that remains in the corrected output, for display; the loop does not use it. `channel_axis`
    is the axis of the output's channels, see `Signature`.
    """

    deployment: Deployment
    prediction: str
    form: str
    stages: npt.NDArray[np.int64]
    scale: Doubles
    shift: Doubles
    excess: Doubles
    spread: Doubles
    channel_axis: int = CHANNELS_FIRST
    _scale: list[np.float32] = field(init=False, repr=False)
    _shift: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.deployment.calls)
        tables = {name: getattr(self, name) for name in (*_TABLES, "stages")}
        wrong = [name for name, table in tables.items() if table.ndim != (2 if name == "shift" else 1)]
        wrong += [name for name, table in tables.items() if len(table) != count]
        if wrong or self.form not in FORMS:
            raise InputError(f"correction tables of {count} calls, form {self.form!r}: {', '.join(wrong)} do not fit")
        if (
            not all(np.all(np.isfinite(table)) for table in tables.values())
            or np.any(self.spread < 0)
            or np.any(self.excess < 0)
        ):
            raise InputError("correction tables hold values that are not finite, or a negative variance")
        if np.any(self.scale <= 0):
            t = self.deployment.calls[int(self.scale.argmin())]
            raise InputError(
                f"the quantized output does not follow the float one at timestep {t:g}",
                hint="quantize less, or with better scales; no correction can repair this",
            )
        object.__setattr__(self, "_scale", list(self.scale.astype(np.float32)))
        object.__setattr__(self, "_shift", self.shift.astype(np.float32))

    @property
    def fitted_for(self) -> str:
        """The deployment that these tables are valid for, in words for messages."""
        return str(self.deployment)

    def refusal(self, deployment: Deployment) -> str | None:
        """Return the reason why these tables cannot correct `deployment`, or None where they can (interpolated)."""
        mine = self.deployment
        if (mine.sampler, mine.eta) != (deployment.sampler, deployment.eta):
            return f"it was fitted for {self.fitted_for}, not for {deployment}"
        if mine.guidance != deployment.guidance:
            return (
                f"it was fitted at guidance {mine.guidance:g}, not {deployment.guidance:g}: "
                "guidance multiplies the error of the network"
            )
        return None

    def for_deployment(self, deployment: Deployment, schedule_steps: Sequence[Step]) -> Correction:
        """Return these tables for the calls of `deployment`, interpolated over the timestep.

        Warns (InterpolatedCorrection) if the calls differ from the fitted ones. Raises InputError with the reason if
        the tables cannot be used.
        """
        if reason := self.refusal(deployment):
            raise InputError(f"the correction is not valid here: {reason}", hint="sample as it was fitted, or without")
        if deployment.calls == self.deployment.calls:
            return self
        stages = np.array([step.stage for step in schedule_steps], np.int64)
        if missing := set(stages.tolist()) - set(self.stages.tolist()):
            raise InputError(f"the correction knows no call of stage {min(missing)} of a step")
        warnings.warn(
            f"noise tables of {self.deployment.steps} steps are interpolated for {deployment.steps}",
            InterpolatedCorrection,
            stacklevel=2,
        )
        known, asked = np.array(self.deployment.calls, float), np.array(deployment.calls, float)

        def interpolated(table: Doubles) -> Doubles:
            out = np.empty((len(asked), *table.shape[1:]))
            for stage in set(stages.tolist()):
                there, here = self.stages == stage, stages == stage
                order = np.argsort(known[there], kind="stable")
                columns = table[there][order].reshape(int(there.sum()), -1)
                found = [np.interp(asked[here], known[there][order], column) for column in columns.T]
                out[here] = np.stack(found, axis=-1).reshape(int(here.sum()), *table.shape[1:])
            return out

        tables = {name: interpolated(getattr(self, name)) for name in _TABLES}
        return Correction(deployment, self.prediction, self.form, stages, **tables, channel_axis=self.channel_axis)

    def picked(self, deployment: Deployment, schedule_steps: Sequence[Step], rows: Sequence[int]) -> Correction:
        """Return these tables for the calls of `deployment`, with row `rows[i]` for its call i. Calls of different
        networks cannot be interpolated. Warns and raises as `for_deployment`.
        """
        if reason := self.refusal(deployment):
            raise InputError(f"the correction is not valid here: {reason}", hint="sample as it was fitted, or without")
        if deployment.calls == self.deployment.calls:
            return self
        warnings.warn(
            f"noise tables of {self.deployment.steps} steps: {deployment.steps} steps take the rows of the nearest",
            InterpolatedCorrection,
            stacklevel=2,
        )
        tables = {name: getattr(self, name)[list(rows)] for name in _TABLES}
        stages = np.array([step.stage for step in schedule_steps], np.int64)
        return Correction(deployment, self.prediction, self.form, stages, **tables, channel_axis=self.channel_axis)

    def apply(self, output: Floats, call: int) -> Floats:
        """Return the corrected output, of any rank, of network call `call`: a new float32 array."""
        behind = output.ndim - 1 - self.channel_axis
        if behind < 0 or output.shape[self.channel_axis] != self.shift.shape[1]:
            raise InputError(f"output of shape {list(output.shape)}, the correction has {self.shift.shape[1]} channels")
        fixed: Floats = output * self._scale[call]
        fixed -= self._shift[call].reshape(-1, *[1] * behind)
        return fixed

    def noise(self, steps: Sequence[Step]) -> tuple[float, ...]:
        """Return the standard deviation of the noise at each call, 0 where the error outweighs the sampler's own."""
        return tuple(math.sqrt(max(0.0, left)) for left in self._variances(steps))

    def clamped(self, steps: Sequence[Step]) -> tuple[bool, ...]:
        """Return for each call whether the variance of the error exceeds that of the sampler's noise."""
        return tuple(left < 0 for left in self._variances(steps))

    def redirected(self, solver: Solver) -> Solver:
        """Return the solver, for the form of PTQD's released code with the direction of DDIM for the reduced sigma."""
        if self.form != "ptqd-released" or self.deployment.sampler != "ddim":
            return solver
        if self.prediction != "epsilon":
            raise InputError(
                f"the released form of PTQD is defined for epsilon, not {self.prediction}", hint="use form ptqd"
            )
        steps = []
        for step, noise in zip(solver.steps, self.noise(solver.steps), strict=True):
            direction = math.sqrt(max(0.0, step.next["out"] ** 2 + step.sigma**2 - noise**2))
            steps.append(replace(step, next={**step.next, "out": direction}))
        return replace(solver, steps=tuple(steps))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the same tables give the same bytes."""
        tables = {name: np.ascontiguousarray(getattr(self, name)) for name in (*_TABLES, "stages")}
        facts: dict[str, Any] = {
            "deployment": self.deployment.to_json(),
            "prediction": self.prediction,
            "form": self.form,
        }
        if self.channel_axis != CHANNELS_FIRST:
            facts["channel_axis"] = self.channel_axis
        # One metadata entry only: safetensors writes several in a random order.
        # save_file would make it readable for this user only.
        Path(path).write_bytes(save(tables, {_METADATA_KEY: json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path) -> Correction:
        """Read a file of `save`. Raises BundleError for any other file."""
        try:
            with safe_open(path, framework="numpy") as file:
                facts: dict[str, Any] = parse_json((file.metadata() or {})[_METADATA_KEY])
                tables = {name: file.get_tensor(name) for name in (*_TABLES, "stages")}
            deployment = Deployment.from_json(facts["deployment"])
            axis = int(facts.get("channel_axis", CHANNELS_FIRST))
            return cls(deployment, str(facts["prediction"]), str(facts["form"]), **tables, channel_axis=axis)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, InputError, ScheduleError) as error:
            raise BundleError(f"not a table of corrections: {error}", where=str(path)) from error

    def _variances(self, steps: Sequence[Step]) -> list[float]:
        if tuple(step.timestep for step in steps) != self.deployment.calls:
            raise TimestepNotDeployed(
                f"the correction has rows for other network calls than these {len(steps)}",
                hint=f"it was fitted for {self.fitted_for}: sample so, or without a correction",
            )
        return [
            step.sigma**2 - step.gain**2 * excess if step.sigma > 0 else 0.0
            for step, excess in zip(steps, self.excess.tolist(), strict=True)
        ]
