"""The expected quantization error of a layer over joined parts, in each form that segments.py can write.

Everything is measured on the graph in which every such layer is taken apart: the parts, what each piece computes, and
the sum. With m_i(grid) the mean squared error of part i on a grid, q_i its mean square, W_i the columns that read it,
dW_i their rounding error, and N output channels, the error of one output value is

    E  =  sum_i  m_i(grid_i) |W_i|^2 / N  +  q_i |dW_i|^2 / N  +  (rounding of what convolutions compute)

as if errors were independent. A whole layer has one grid, over the ranges of all parts divided by their factors f_i (a
part sees it f_i times as wide), and one scale for each row of [f_i W_i]; the pieces have grids of their own, but a
convolution rounds each of them once more. Each network call has its own ranges, as step_scales gives them, while
factors and weights are the same for all; an error counts relative to the power of the output at its call.

Forms are compared by `cost`, in which the error of the weights counts as often as there are calls. It is the same at
every call, so along a trajectory it adds up in amplitude; errors of activations differ from call to call, and add up in
power. Without this, powers of two (DMQ) on mnist-onnx gained 0.0 to 0.2 dB of epsilon by W8A8 and lost 5.3, 4.3 and 2.8
dB of images (median PSNR of 32 images, 20 steps, three calibration seeds): with activations in float, 12.9 dB were lost
by the weights alone. With it nothing is divided there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from mezzotint.runtime.arrays import Doubles, Floats
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep

from ..calibration.calibrate import follow_trajectories
from ..calibration.collect import Collector
from ..core.execute import Executor
from ..core.formats import Format, dequantize, quantize, scale_for_range
from ..core.pipeline import Context
from ..core.program import Program
from ..core.stats import Summary
from ..graph.nodes import Names, name_of, numpy_of
from ..rescaling.scaling import channel_axis
from ..scales.ranges import expected_error, range_of
from .channel_powers import ChannelErrors
from .segments import Joined, Pieces, find_joined, split_layer

Form = Literal["whole", "factors", "layers"]
PERCENTILE = 99.999
OCTAVES = 8  # factors are sought this far up and down


@dataclass(frozen=True, eq=False)
class Seen:
    """Summaries of each network call: of each part, of the output of its piece, and of the sum.

    `extremes` and `squares` are those of the channels of all parts: lowest and highest values `[calls, 2, C]`, mean
    squares `[calls, C]`.
    """

    parts: tuple[tuple[Summary, ...], ...]
    partial: tuple[tuple[Summary, ...], ...]
    total: tuple[Summary, ...]
    extremes: Doubles
    squares: Doubles


def measure_segments(
    program: Program, context: Context, wanted: Sequence[str], samples: int, stage: str
) -> dict[str, Seen]:
    """Return summaries by layer name, from a few trajectories through a copy of the graph with these layers split."""
    model = program.model.clone()
    names = Names(model.graph)
    found, _ = find_joined(model.graph)
    chosen = [joined for joined in found if joined.name in wanted]
    axes = {joined.name: channel_axis(joined.layer) for joined in chosen}
    pieces = {joined.name: split_layer(model.graph, names, joined) for joined in chosen}
    by_channel = {name_of(part): axes[name] for name, p in pieces.items() for part in p.parts}
    values = [name_of(v) for p in pieces.values() for v in (*p.parts, *p.partial, p.total)]
    inputs = {name_of(v) for v in model.graph.inputs}
    signature = program.signature
    calls = {t: k for k, t in enumerate(program.deployment.timesteps)}
    taps = list(dict.fromkeys(v for v in values if v not in inputs))
    with (
        Collector(by_channel, by_channel) as collector,
        Executor(model, context.folder, taps=taps, threads=context.threads) as executor,
    ):

        def observe(x: Images, t: Timestep, conditions: Conditions) -> Images:
            outputs = executor.call(signature, x, t, conditions)
            seen = {signature.sample: x, **conditions, **outputs}
            collector.add(calls[t], t, {name: seen[name] for name in dict.fromkeys(values)})
            return np.asarray(outputs[signature.output], np.float32)

        follow_trajectories(program, replace(context, samples=min(samples, context.samples)), observe, stage)
        collector.settle()
    summaries = collector.summaries

    def of(value: str) -> tuple[Summary, ...]:
        return tuple(summaries[value, k] for k in range(len(calls)))

    def seen(pieces: Pieces) -> Seen:
        names = [name_of(v) for v in pieces.parts]
        parts = tuple(of(name) for name in names)
        extremes = [np.concatenate([collector.channels[name, k] for name in names], axis=1) for k in range(len(calls))]
        squares = [
            np.concatenate(
                [
                    (sums := collector.squares[name, k]) * len(sums) / part[k].count
                    for name, part in zip(names, parts, strict=True)
                ]
            )
            for k in range(len(calls))
        ]
        partial = tuple(of(name_of(v)) for v in pieces.partial)
        return Seen(parts, partial, of(name_of(pieces.total)), np.array(extremes, np.float64), np.array(squares))

    return {name: seen(p) for name, p in pieces.items()}


class FormCosts:
    """Expected error and memory traffic of one layer in each form."""

    def __init__(self, joined: Joined, seen: Seen, activations: Format, weights: Format) -> None:
        self._joined, self._seen, self._format, self._weights = joined, seen, activations, weights
        self._weight = np.asarray(numpy_of(joined.layer.require_weight()), np.float32)
        self._axis = joined.layer.require_weight_axis()
        self._outputs = self._weight.shape[self._axis]
        self._power = [max(s.square / s.count, 1e-30) for s in seen.total]
        self._range = lru_cache(maxsize=None)(self._measured_range)
        self._energy = [float(np.square(joined.columns(i, self._weight)).sum()) for i in range(len(seen.parts))]

    def cost(self, form: Form, factors: Sequence[float] = ()) -> float:
        """Return the error that decides: that of the weights, the same at every call, counts as often."""
        return self.error(form, factors, len(self._power))

    def error(self, form: Form, factors: Sequence[float] = (), calls: int = 1) -> float:
        """Return the mean over the network calls of the squared error, relative to the power of the output.

        The error of the weights counts `calls` times.
        """
        count = len(self._seen.parts)
        f = list(factors) or [1.0] * count
        lost = self._weight_errors(f, apart=form == "layers")
        errors = []
        for call, power in enumerate(self._power):
            error = self._output_error(call, apart=form == "layers")
            ranges = [self._range(i, call) for i in range(count)]
            low, high = min(r[0] / x for r, x in zip(ranges, f, strict=True)), 0.0
            high = max(r[1] / x for r, x in zip(ranges, f, strict=True))
            for i, part in enumerate(self._seen.parts):
                summary = part[call]
                grid = ranges[i] if form == "layers" else (low * f[i], high * f[i])
                error += expected_error(summary, *grid, self._format) * self._energy[i] / self._outputs
                error += calls * summary.square / summary.count * lost[i] / self._outputs
            errors.append(error / power)
        return float(np.mean(errors))

    def best_factors(self, step: float) -> tuple[float, ...]:
        """Factors `2^(k step)`, the first of them 1, of the least error; one after the other until none changes."""
        exponents = np.arange(-OCTAVES, OCTAVES + step / 2, step)
        chosen = [0.0] * len(self._seen.parts)
        least = self.cost("factors")
        improved = True
        while improved:
            improved = False
            for i in range(1, len(chosen)):
                for k in exponents:
                    tried = [*chosen[:i], float(k), *chosen[i + 1 :]]
                    error = self.cost("factors", [2.0**e for e in tried])
                    if error < least:
                        least, chosen, improved = error, tried, True
        return tuple(2.0**e for e in chosen)

    def channel_factors(self) -> tuple[float, ...]:
        """Return powers of two for the channels `[C]`, of the least error; those of whole parts are considered too."""
        layer, seen = self._joined.layer, self._seen
        weight = self._weight.astype(np.float64)
        columns = weight.reshape(*weight.shape[:2], -1)
        if layer.kind != "conv" and self._axis == 1:
            columns = columns.swapaxes(0, 1)
        low, high = seen.extremes[:, 0], seen.extremes[:, 1]
        errors = ChannelErrors(low, high, seen.squares, np.array(self._power), columns, self._format, self._weights)
        parts = np.log2(np.repeat(self.best_factors(1.0), self._joined.sizes))
        return tuple((2.0 ** errors.best(parts)).tolist())

    def traffic(self, form: Form) -> float:
        """Return the bytes that one form moves for one image, without weights (all forms multiply equally often)."""
        read = sum(part[0].count for part in self._seen.parts)
        written = self._seen.total[0].count
        pieces = len(self._seen.parts) if form == "layers" else 1
        conv = self._joined.layer.kind == "conv"
        output_bytes = 1 + 5 if conv else 4  # 8 bits and back to float, or float at once
        moved = 6.0 * read + pieces * output_bytes * written  # float to 8 bits, and read by the layer
        if form == "factors":
            moved += 8 * read
        return moved + (4 * (pieces + 1) * written if pieces > 1 else 0)

    def _measured_range(self, part: int, call: int) -> tuple[float, float]:
        low, high = range_of(self._seen.parts[part][call], "percentile", PERCENTILE, self._format)
        return min(low, 0.0), max(high, 0.0)

    def _output_error(self, call: int, *, apart: bool) -> float:
        if not self._joined.layer.output_quantized:
            return 0.0
        outputs = [p[call] for p in self._seen.partial] if apart else [self._seen.total[call]]
        return sum(
            expected_error(s, *range_of(s, "percentile", PERCENTILE, self._format), self._format) for s in outputs
        )

    def _weight_errors(self, factors: Sequence[float], *, apart: bool) -> list[float]:
        """Return the squared rounding error of the columns of each part, in units of the original weight."""
        columns = [self._joined.columns(i, self._weight) * np.float32(f) for i, f in enumerate(factors)]
        limits = [np.abs(np.moveaxis(c, self._axis, 0)).reshape(self._outputs, -1).max(axis=1) for c in columns]
        common = np.max(limits, axis=0)
        lost = []
        for i, factor in enumerate(factors):
            limit: Floats = limits[i] if apart else common
            scale, zero = scale_for_range(-limit, limit, self._weights)
            rounded = dequantize(quantize(columns[i], scale, zero, self._weights, self._axis), scale, zero, self._axis)
            lost.append(float(np.square((rounded - columns[i]) / np.float32(factor)).sum()))
        return lost
