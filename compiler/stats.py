"""Mergeable summaries of values, for each value and group of network calls.

A summary never keeps an activation. Its histogram has one bin for every combination of sign, exponent and the four
highest mantissa bits of a float32, so the bins are the same for everything that was ever measured: two histograms merge
by addition, whatever ranges they saw, and a bin is at most 1/16 octave wide. Magnitudes below 2^-24 share the lowest
bin, those above 2^17 the highest (the extremes themselves are kept exactly).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_MANTISSA_BITS = 4
_SHIFT = np.uint32(23 - _MANTISSA_BITS)
_LOWEST = np.uint32((127 - 24) << _MANTISSA_BITS)
_HIGHEST = np.uint32(((127 + 17) << _MANTISSA_BITS) - 1)
_HALF = int(_HIGHEST - _LOWEST) + 1
_BINS = 2 * _HALF

Counts = npt.NDArray[np.int64]


def _edges() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    keys = np.arange(_LOWEST, _HIGHEST + 2, dtype=np.uint32) << _SHIFT
    values = keys.view(np.float32).astype(np.float64)
    low, high = values[:-1].copy(), values[1:].copy()
    low[0], high[-1] = 0.0, np.inf
    return np.concatenate([low, -high]), np.concatenate([high, -low])


BIN_LOW, BIN_HIGH = _edges()


def _keys(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """The bin of each value; the negative half follows the positive one."""
    bits = values.view(np.uint32)
    keys: npt.NDArray[np.uint32] = np.clip((bits & np.uint32(0x7FFFFFFF)) >> _SHIFT, _LOWEST, _HIGHEST) - _LOWEST
    keys += (bits >> np.uint32(31)) * np.uint32(_HALF)
    return keys


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
        """Fold in an array of any shape. NaN is refused by the caller, which knows the value's name."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not flat.size:
            return
        self.count += flat.size
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
        self.total += float(flat.sum(dtype=np.float64))
        self.square += float(np.einsum("i,i->", flat, flat, dtype=np.float64, casting="same_kind"))
        self.histogram += np.bincount(_keys(flat), minlength=_BINS)

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
        return bool(np.isfinite(self.total) and np.isfinite(self.low) and np.isfinite(self.high))

    def bins(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], Counts]:
        """(low edges, high edges, counts) of the bins that hold something, ascending in value."""
        used = np.flatnonzero(self.histogram)
        order = used[np.argsort(BIN_LOW[used], kind="stable")]
        low = np.clip(BIN_LOW[order], self.low, self.high)
        high = np.clip(BIN_HIGH[order], self.low, self.high)
        return low, high, self.histogram[order]

    def percentile(self, share: float) -> float:
        """The value below which `share` (0..1) of the values lie, linear within a bin."""
        low, high, counts = self.bins()
        cumulative = np.cumsum(counts)
        i = min(int(np.searchsorted(cumulative, share * self.count)), len(counts) - 1)
        inside = (share * self.count - (cumulative[i] - counts[i])) / counts[i]
        return float(low[i] + (high[i] - low[i]) * np.clip(inside, 0.0, 1.0))


@dataclass(frozen=True)
class Stats:
    """Summaries keyed by (value name, group of calls), and what they were measured on.

    `digest` is that of the graph, so that statistics of another graph are refused; `calls` counts network calls.
    """

    digest: str
    groups: int
    calls: int
    summaries: dict[tuple[str, int], Summary]

    def values(self) -> Iterable[str]:
        return dict.fromkeys(name for name, _ in self.summaries)

    def summary(self, value: str) -> Summary | None:
        """The summary of a value over all calls, or None when it was not measured."""
        parts = [self.summaries[value, g] for g in range(self.groups) if (value, g) in self.summaries]
        return sum(parts[1:], parts[0]) if parts else None

    def __add__(self, other: Stats) -> Stats:
        if (self.digest, self.groups) != (other.digest, other.groups):
            raise ValueError("statistics of different graphs or groupings do not add")
        merged = dict(self.summaries)
        for key, summary in other.summaries.items():
            merged[key] = merged[key] + summary if key in merged else summary
        return Stats(self.digest, self.groups, self.calls + other.calls, merged)
