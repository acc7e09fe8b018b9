"""The ranges of a program's quantizers along its trajectory, for display
(runtime/bundle/ranges.py)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.bundle.ranges import Ranges

from ..core.program import Program, Quantizer, Site
from ..core.stats import Stats


def range_rows(program: Program) -> Ranges | None:
    """Return rows in the order of the plan's quantizers; None without quantizers."""
    plan, timesteps = program.plan, program.deployment.timesteps
    if plan is None or not plan.quantizers:
        return None
    groups = np.array(plan.groups or [0] * len(timesteps))
    covered = np.stack([_covered(quantizer)[:, _rows(quantizer, groups)] for quantizer in plan.quantizers.values()])
    seen = np.stack([_seen(site, program.stats, len(timesteps)) for site in plan.quantizers])
    low, high, scale = np.moveaxis(covered, 1, 0).astype(np.float32)
    seen_low, seen_high = np.moveaxis(seen, 1, 0).astype(np.float32)
    return Ranges(np.array(timesteps, np.float64), low, high, scale, seen_low, seen_high)


def _rows(quantizer: Quantizer, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the row of each timestep; a constant quantizer has one row."""
    return groups if quantizer.table else np.zeros_like(groups)


def _covered(quantizer: Quantizer) -> Doubles:
    """Return (low, high, scale) `[3, rows]` of a quantizer, the widest over its channels."""
    rows = len(quantizer.scale) if quantizer.table else 1
    scale = quantizer.scale.reshape(rows, -1).astype(np.float64)
    zero = np.broadcast_to(quantizer.zero_point.reshape(rows, -1).astype(np.float64), scale.shape)
    bottom, top = np.asarray(quantizer.grid.qmin, np.float64), np.asarray(quantizer.grid.qmax, np.float64)
    low, high = ((bottom - zero) * scale).min(axis=1), ((top - zero) * scale).max(axis=1)
    return np.stack([low, high, scale.max(axis=1)])


def _seen(site: Site, stats: Stats | None, calls: int) -> Doubles:
    """Return the extremes `[2, calls]` of a value; calls of one group of the calibration share them."""
    extremes = np.full((2, calls), np.nan)
    if stats is None:
        return extremes
    for k in range(calls):
        if summary := stats.summaries.get((site.value, k * stats.groups // calls)):
            extremes[:, k] = summary.low, summary.high
    return extremes
