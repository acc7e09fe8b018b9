"""Statistics of channels that were never measured, for the passes that choose factors for input channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.stats import Stats, Summary
from mezzotint.compiler.graph import nodes as graphs


def with_channels(value: str, axis: int, peaks: Sequence[float]) -> Callable[[Program], Program]:
    """Gives a program statistics in which the channels of one value reach from -peak to peak, in each of two calls.

    A third of a peak is the root mean square, as of a normal distribution.
    """

    def give(program: Program) -> Program:
        ends = np.asarray(peaks, np.float32)
        count = 100 * len(ends)
        summary = Summary(count, -float(ends.max()), float(ends.max()), square=float((ends**2).sum()) * 100 / 9)
        stats = Stats(
            graphs.digest(program.model),
            2,
            2,
            {(value, call): summary for call in range(2)},
            program.deployment.timesteps[:2],
            {(value, call): np.stack([-ends, ends]) for call in range(2)},
            {(value, call): ends.astype(np.float64) ** 2 * 100 / 9 for call in range(2)},
            {value: axis},
        )
        return replace(program, stats=stats)

    return give
