"""Mergeable summaries of activations, for each value and group of network calls.

A summary keeps no activations. Its histogram has one bin for each combination of sign, exponent and the four highest
mantissa bits of a float32. The bins never depend on the data: two histograms merge by addition, and a bin is at most
1/16 octave wide. Magnitudes below 2^-24 share the lowest bin, those above 2^17 the highest. The extremes are exact.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.signature import Timestep

from ..errors import StatsError

_MANTISSA_BITS = 4
_SHIFT = np.uint32(23 - _MANTISSA_BITS)
_LOWEST = np.uint32((127 - 24) << _MANTISSA_BITS)
_HIGHEST = np.uint32(((127 + 17) << _MANTISSA_BITS) - 1)
_HALF = int(_HIGHEST - _LOWEST) + 1
_BINS = 2 * _HALF
_KEYS = 2 << (8 + _MANTISSA_BITS)  # of a whole float32: sign, exponent and the highest mantissa bits
_NAMED = 5  # timesteps that an error lists
_BLOCK = 1 << 16  # values added at once: all temporaries fit into the cache of one core

Counts = npt.NDArray[np.int64]


def _edges() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    keys = np.arange(_LOWEST, _HIGHEST + 2, dtype=np.uint32) << _SHIFT
    values = keys.view(np.float32).astype(np.float64)
    low, high = values[:-1].copy(), values[1:].copy()
    low[0], high[-1] = 0.0, np.inf
    return np.concatenate([low, -high]), np.concatenate([high, -low])


BIN_LOW, BIN_HIGH = _edges()


@dataclass
class Summary:
    """Count, extremes, moments and histogram of a stream of float32 values."""

    count: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    square: float = 0.0
    histogram: Counts = field(default_factory=lambda: np.zeros(_BINS, np.int64))

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Add an array of any shape. The caller refuses NaN, because it knows the name of the value."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not flat.size:
            return
        bits = flat.view(np.uint32)
        counts = np.zeros(_KEYS, np.int64)
        wide = np.empty(min(_BLOCK, flat.size), np.float64)
        short, keys = np.empty(wide.size, np.uint32), np.empty(wide.size, np.int64)
        for first in range(0, flat.size, _BLOCK):
            part = flat[first : first + _BLOCK]
            size = part.size
            self.low = min(self.low, float(part.min()))
            self.high = max(self.high, float(part.max()))
            np.copyto(wide[:size], part)
            # Not `dot`: BLAS divides it among threads, and the last bits would depend on their number.
            self._add_sums(float(wide[:size].sum()), float(np.einsum("i,i->", wide[:size], wide[:size])))
            np.right_shift(bits[first : first + _BLOCK], _SHIFT, out=short[:size])
            np.copyto(keys[:size], short[:size])  # int64: bincount would convert to it, more slowly
            counts += np.bincount(keys[:size], minlength=_KEYS)
        self.count += flat.size
        self._fold(counts)

    def replay(self, other: RecordedSummary) -> None:
        """Add a recorded summary, with the same bits as if its values had been added here."""
        for total, square in zip(other.totals, other.squares, strict=True):
            self._add_sums(total, square)
        self.count += other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.histogram += other.histogram

    def _add_sums(self, total: float, square: float) -> None:
        """Add the sums of a block of values. Sums of floats depend on their order: it is that of the blocks."""
        self.total += total
        self.square += square

    def _fold(self, counts: Counts) -> None:
        """Add counts by float32 key `[_KEYS]`. Magnitudes beyond the bins go to the first or last bin."""
        for sign, half in enumerate(counts.reshape(2, -1)):
            bins = self.histogram[sign * _HALF : (sign + 1) * _HALF]
            bins += half[_LOWEST : _HIGHEST + 1]
            bins[0] += half[:_LOWEST].sum()
            bins[-1] += half[_HIGHEST + 1 :].sum()

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.count + other.count,
            min(self.low, other.low),
            max(self.high, other.high),
            self.total + other.total,
            self.square + other.square,
            self.histogram + other.histogram,
        )

    @property
    def finite(self) -> bool:
        """Return whether no value was NaN or infinite."""
        return bool(np.isfinite(self.total) and np.isfinite(self.low) and np.isfinite(self.high))

    def bins(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], Counts]:
        """Return (low edges, high edges, counts) of the bins that are not empty, ascending in value."""
        used = np.flatnonzero(self.histogram)
        order = used[np.argsort(BIN_LOW[used], kind="stable")]
        low = np.clip(BIN_LOW[order], self.low, self.high)
        high = np.clip(BIN_HIGH[order], self.low, self.high)
        return low, high, self.histogram[order]

    def percentile(self, share: float) -> float:
        """Return the value below which `share` (0..1) of the values lie, linear within a bin."""
        low, high, counts = self.bins()
        cumulative = np.cumsum(counts)
        i = min(int(np.searchsorted(cumulative, share * self.count)), len(counts) - 1)
        inside = (share * self.count - (cumulative[i] - counts[i])) / counts[i]
        return float(low[i] + (high[i] - low[i]) * np.clip(inside, 0.0, 1.0))


@dataclass
class RecordedSummary(Summary):
    """A summary that keeps the sums of each block of values, so that `Summary.replay` can add them in their order."""

    totals: array[float] = field(default_factory=lambda: array("d"))
    squares: array[float] = field(default_factory=lambda: array("d"))

    def _add_sums(self, total: float, square: float) -> None:
        super()._add_sums(total, square)
        self.totals.append(total)
        self.squares.append(square)


@dataclass(frozen=True)
class Stats:
    """Summaries keyed by (value name, group of calls), and the graph and calls that they were measured on.

    digest     the digest of the graph; statistics of another graph are refused
    calls      the number of network calls
    timesteps  those of the calls of one trajectory, in order, which the groups divide; empty when not recorded
    channels   the extremes `[2, C]` of each channel, for values that were measured by channel
    squares    the sums of squares `[C]` of each channel, where requested
    axes       the channel axis of each value that was measured by channel
    """

    digest: str
    groups: int
    calls: int
    summaries: dict[tuple[str, int], Summary]
    timesteps: tuple[Timestep, ...] = ()
    channels: Mapping[tuple[str, int], npt.NDArray[np.float32]] = field(default_factory=dict)
    squares: Mapping[tuple[str, int], npt.NDArray[np.float64]] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)

    def check_graph(self, digest: str, where: str) -> None:
        """Raise StatsError unless the statistics were measured on the graph with this digest."""
        if self.digest != digest:
            raise StatsError(
                "the statistics were measured on another graph", where=where, hint="run observe on this graph first"
            )

    def values(self) -> Iterable[str]:
        """Return the names of the measured values, in order."""
        return dict.fromkeys(name for name, _ in self.summaries)

    def summary(self, value: str) -> Summary | None:
        """Return the summary of a value over all calls, or None when it was not measured."""
        parts = [self.summaries[value, g] for g in range(self.groups) if (value, g) in self.summaries]
        return sum(parts[1:], parts[0]) if parts else None

    def extremes(self, value: str, axis: int) -> npt.NDArray[np.float64] | None:
        """Return the extremes `[groups, 2, C]` of each channel along that axis, or None when they were not measured.

        Groups without samples are left out.
        """
        if self.axes.get(value) != axis:
            return None
        by_group = [self.channels[value, g] for g in range(self.groups) if (value, g) in self.channels]
        return np.stack(by_group).astype(np.float64) if by_group else None

    def mean_squares(self, value: str, axis: int) -> npt.NDArray[np.float64] | None:
        """Return the mean square `[C]` of each channel along that axis over all calls, or None when not measured."""
        if self.axes.get(value) != axis:
            return None
        keys = [(value, g) for g in range(self.groups) if (value, g) in self.squares]
        if not keys:
            return None
        total = np.sum([self.squares[key] for key in keys], axis=0)
        mean: npt.NDArray[np.float64] = total * len(total) / sum(self.summaries[key].count for key in keys)
        return mean

    def __add__(self, other: Stats) -> Stats:
        if (self.digest, self.groups, self.timesteps) != (other.digest, other.groups, other.timesteps):
            raise ValueError("statistics of different graphs or groupings do not add")
        if any(other.axes.get(value, axis) != axis for value, axis in self.axes.items()):
            raise ValueError("statistics of channels along different axes do not add")
        merged = dict(self.summaries)
        for key, summary in other.summaries.items():
            merged[key] = merged[key] + summary if key in merged else summary
        channels = dict(self.channels)
        for key, extremes in other.channels.items():
            known = channels.get(key, extremes)
            channels[key] = np.stack([np.minimum(known[0], extremes[0]), np.maximum(known[1], extremes[1])])
        squares = dict(self.squares)
        for key, sums in other.squares.items():
            squares[key] = squares[key] + sums if key in squares else sums
        axes = {**self.axes, **other.axes}
        calls = self.calls + other.calls
        return Stats(self.digest, self.groups, calls, merged, self.timesteps, channels, squares, axes)

    def check_every_call(self, timesteps: Sequence[Timestep], where: str) -> None:
        """Raise StatsError unless the statistics have each of these network calls as a group of its own.

        The error names the timesteps without samples, each with the nearest timestep that has some.
        """
        known = self.timesteps or tuple(timesteps)
        if self.groups != len(known):
            raise StatsError(
                f"statistics of {self.groups} groups for {len(known)} network calls",
                where=where,
                hint="measure every call on its own: --set observe.groups=0",
            )
        groups = {group for _, group in self.summaries}
        measured = [t for k, t in enumerate(known) if k in groups]
        missing = [t for t in timesteps if t not in measured]
        if not missing and tuple(timesteps) == known:
            return
        if not missing:
            raise StatsError(
                f"statistics of {len(known)} network calls for a deployment that makes {len(timesteps)} of them",
                where=where,
                hint="run observe with the deployment that the tables are for",
            )
        named = ", ".join(_with_nearest(t, measured) for t in missing[:_NAMED])
        more = f", and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise StatsError(
            f"{len(missing)} of {len(timesteps)} timesteps were never calibrated: {named}{more}",
            where=where,
            hint="give every call a sample (a larger allocate_steps.share, or the method uniform), and run observe "
            "with the deployment that the tables are for",
        )


def _with_nearest(timestep: Timestep, measured: Sequence[Timestep]) -> str:
    if not measured:
        return str(timestep)
    return f"{timestep} (nearest calibrated: {min(measured, key=lambda t: (abs(t - timestep), t))})"
