"""TDQ: ranges from a small network of the timestep, trained offline and then discarded (arXiv 2306.02316).

    (-low, high)(t) = unit * softplus(W4 relu(W3 relu(W2 relu(W1 PE(t) + b1) + b2) + b3) + b4)

`unit` is the widest measured range of each side, and W4 = 0, b4 = softplus^-1(1): learning starts from the static
range, where little is clipped. Low is never above 0, high never below, and a side without values (the low side of a
softmax) stays 0. TDQ learns one symmetric interval by backpropagation through the quantized network. Here the loss
needs no denoiser: it is the expected error of quantizing the histograms of the calls, relative to the mean square P of
each call,

    L = sum_calls 1/P (s^2 / 12  +  clip_weight * sum_bins mass E[(|x| - reach)+^2]),    s = (high - low) / (levels - 1)

with the values spread evenly over their bin [a, b]. With p = (b - reach)+ and q = (a - reach)+,

    E = (p^3 - q^3) / (3 (b - a)),       dE/dreach = -(p^2 - q^2) / (b - a).

Clipped values, which are few, are charged with the rounding error too: this makes L differentiable.

A network instead of the best range of each call has two advantages. Neighbouring calls share it, which averages out the
noise of one call, and it has a value at timesteps without measurements. The embedding has no wave shorter than sixteen
calls, because the measurements do not constrain faster ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mezzotint.runtime import streams
from mezzotint.runtime.progress import CallProgress

from ..core.formats import Format
from ..core.stats import Summary

Numbers = npt.NDArray[np.floating]

HIDDEN = 64
WAVES = 16
SHORTEST = 16  # calls
BINS = 40  # 2.5 octaves below each call's extreme; smaller values share the last bin
ITERATIONS = 300
RATE = 4e-3
DECAYS = (0.9, 0.99)
AT_ONCE = 16  # networks trained together: few enough for the cache


@dataclass(frozen=True, eq=False)
class Observed:
    """Histograms of the values of some quantizers in each call, as magnitudes on the low (0) and the high side (1).

    inner, outer  the edges of the bins, `[values, calls, 2, bins]`
    mass          the share of values in each bin over the mean square of the call, of the same shape
    rounding      1 / 12 P (levels - 1)^2, `[values, calls]`
    unit          the range for a network's output of 1, `[values, 1, 2]`
    size          the unit of all lengths, `[values, 1, 1]`, which keeps small ones within single precision
    """

    inner: Numbers
    outer: Numbers
    mass: Numbers
    rounding: Numbers
    unit: Numbers
    size: Numbers

    @staticmethod
    def of(
        calls: Sequence[Sequence[Summary]], ranges: npt.NDArray[np.float64], fmt: Format, dtype: npt.DTypeLike
    ) -> Observed:
        """Return the histograms of the summaries of each value and call, with measured ranges `[values, calls, 2]`."""
        unit = np.maximum(ranges * [-1.0, 1.0], 0.0).max(axis=1, keepdims=True)
        size = np.maximum(unit.max(axis=2, keepdims=True), 1e-12)
        bins = np.zeros((3, *ranges.shape, BINS))
        rounding = np.empty(ranges.shape[:2])
        for v, summaries in enumerate(calls):
            for k, summary in enumerate(summaries):
                power = max(summary.square / max(summary.count, 1) / float(size[v, 0, 0]) ** 2, 1e-12)
                bins[:, v, k] = _sides(summary, float(size[v, 0, 0]))
                bins[2, v, k] /= power
                rounding[v, k] = 1 / (12 * power * (fmt.qmax - fmt.qmin) ** 2)
        return Observed(*(np.asarray(array, dtype) for array in (*bins, rounding, unit / size, size)))


def _sides(summary: Summary, size: float) -> npt.NDArray[np.float64]:
    """Return (inner edges, outer edges, shares) `[3, 2, BINS]` of the values below and above 0, largest first."""
    low, high, counts = summary.bins()
    low, high = low / size, high / size
    sides = np.zeros((3, 2, BINS))
    sides[1] = 1.0  # an empty bin has a width too
    for side, (inner, outer) in enumerate(((-high, -low), (low[::-1], high[::-1]))):
        share = (counts if side == 0 else counts[::-1]) / max(summary.count, 1)
        above = outer > 0
        inner, outer, share = np.maximum(inner[above], 0.0), outer[above], share[above]
        if outer.size > BINS:
            share[BINS - 1] = share[BINS - 1 :].sum()
            inner[BINS - 1] = 0.0
        size = min(outer.size, BINS)
        sides[:, side, :size] = np.minimum(inner, outer * (1 - 1e-3))[:size], outer[:size], share[:size]
    return sides


def loss_and_gradient(seen: Observed, reach: Numbers, clip_weight: float) -> tuple[Numbers, Numbers]:
    """Return the loss `[values]` of ranges (-low, high) `[values, calls, 2]`, and its gradient by the ranges."""
    width = reach.sum(axis=2)
    far = np.maximum(seen.outer - reach[..., None], 0)
    near = np.maximum(seen.inner - reach[..., None], 0)
    rate = clip_weight * seen.mass / (seen.outer - seen.inner)
    square, near_square = far * far, near * near
    clipped = np.sum(rate * (square * far - near_square * near), axis=(1, 2, 3)) / 3
    gradient = (2 * seen.rounding * width)[..., None] - np.sum(rate * (square - near_square), axis=3)
    return np.sum(seen.rounding * width**2, axis=1) + clipped, gradient


def embed(timesteps: Sequence[float], span: float, calls: int, dtype: npt.DTypeLike) -> Numbers:
    """Return PE(t), sines and cosines `[timesteps, 2 WAVES]`: half a wave over `span` up to one per SHORTEST calls."""
    fastest = max(2 * np.pi * calls / SHORTEST, np.pi)
    angles = np.asarray(timesteps, np.float64)[:, None] / span * np.geomspace(np.pi, fastest, WAVES)
    return np.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)


class Networks:
    """One network for each value, in stacked arrays: weights `[values, in, out]`, biases `[values, 1, out]`."""

    def __init__(self, seeds: Sequence[tuple[int, int]], dtype: npt.DTypeLike) -> None:
        sizes = (2 * WAVES, HIDDEN, HIDDEN, HIDDEN)
        self.parameters: list[Numbers] = []
        draws = [streams.RANGE_NETWORKS.generator(seed, value) for seed, value in seeds]
        for inputs, outputs in pairwise(sizes):
            weight = [draw.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs) for draw in draws]
            self.parameters += [np.asarray(weight, dtype), np.zeros((len(seeds), 1, outputs), dtype)]
        start = np.log(np.expm1(1.0))
        self.parameters += [np.zeros((len(seeds), HIDDEN, 2), dtype), np.full((len(seeds), 1, 2), start, dtype)]

    def forward(self, embedding: Numbers) -> tuple[Numbers, list[Numbers]]:
        """Return softplus(output) `[values, timesteps, 2]`, and the list of the layers' inputs and the raw output."""
        read = [embedding]
        for weight, bias in zip(self.parameters[0:-2:2], self.parameters[1:-2:2], strict=True):
            read.append(np.maximum(read[-1] @ weight + bias, 0))
        read.append(read[-1] @ self.parameters[-2] + self.parameters[-1])
        return np.logaddexp(read[-1], 0), read

    def backward(self, gradient: Numbers, read: list[Numbers]) -> list[Numbers]:
        """Return the gradients by the parameters, from the gradient by the output of forward."""
        gradients: list[Numbers] = []
        back = gradient * (1 + np.tanh(read[-1] / 2)) / 2
        for layer in range(len(read) - 2, -1, -1):
            gradients = [np.swapaxes(read[layer], -1, -2) @ back, back.sum(axis=1, keepdims=True), *gradients]
            if layer:
                back = (back @ np.swapaxes(self.parameters[2 * layer], -1, -2)) * (read[layer] > 0)
        return gradients


def learn(
    seen: Observed,
    networks: Networks,
    embedding: Numbers,
    clip_weight: float,
    progress: Callable[[int], None],
) -> None:
    """Train the networks in place: Adam on all parameters and calls at once, the rate falling to 0 as half a cosine.

    The objective is log L, and the gradient of each value is clipped to length 1: one step into clipping raises L a
    thousandfold, and Adam's memory of that gradient would keep the range too wide.
    """
    first = [np.zeros_like(p) for p in networks.parameters]
    second = [np.zeros_like(p) for p in networks.parameters]
    for i in range(ITERATIONS):
        output, read = networks.forward(embedding)
        loss, gradient = loss_and_gradient(seen, output * seen.unit, clip_weight)
        gradient = gradient * seen.unit / np.maximum(loss, 1e-30)[:, None, None]
        gradient /= np.maximum(np.sqrt(np.sum(gradient**2, axis=(1, 2), keepdims=True)), 1)
        rate = RATE * (1 + np.cos(np.pi * i / ITERATIONS)) / 2
        rate *= np.sqrt(1 - DECAYS[1] ** (i + 1)) / (1 - DECAYS[0] ** (i + 1))
        gradients = networks.backward(gradient, read)
        for p, g, m, v in zip(networks.parameters, gradients, first, second, strict=True):
            m += (1 - DECAYS[0]) * (g - m)
            v += (1 - DECAYS[1]) * (g * g - v)
            p -= rate * m / (np.sqrt(v) + 1e-12)
        progress(i + 1)


def learned_ranges(
    calls: Sequence[Sequence[Summary]],
    ranges: npt.NDArray[np.float64],
    fmt: Format,
    timesteps: Sequence[float],
    span: float,
    *,
    clip_weight: float,
    seed: int,
    at: Sequence[float] | None = None,
    progress: CallProgress = lambda done, total: None,
) -> npt.NDArray[np.float64]:
    """Return the learned (low, high) of each value at each timestep, `[values, timesteps, 2]`, low <= 0 <= high.

    `calls` are the summaries of each value and call, `ranges` `[values, calls, 2]` the measured ranges that learning
    starts from, `timesteps` those of the calls, within 0 .. `span`. `at` are the timesteps of the result, by default
    those of the calls. The same seed gives the same bytes.
    """
    total = len(calls) * ITERATIONS
    embedding = embed(timesteps, span, len(timesteps), np.float32)
    evaluated = embedding if at is None else embed(at, span, len(timesteps), np.float32)
    learned = [np.zeros((0, len(evaluated), 2))]
    for start in range(0, len(calls), AT_ONCE):
        part = slice(start, min(start + AT_ONCE, len(calls)))
        seen = Observed.of(calls[part], ranges[part], fmt, np.float32)
        networks = Networks([(seed, v) for v in range(part.start, part.stop)], np.float32)
        learn(seen, networks, embedding, clip_weight, partial(_report, progress, part, total))
        learned.append((networks.forward(evaluated)[0] * seen.unit * seen.size).astype(np.float64) * [-1.0, 1.0])
    return np.concatenate(learned)


def _report(progress: CallProgress, part: slice, total: int, iteration: int) -> None:
    """Report an iteration of one part of the networks as progress over all of them."""
    progress(part.start * ITERATIONS + iteration * (part.stop - part.start), total)
