"""The time of one network call: several networks in one run, in blocks, so that a drift affects all of them equally."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .signature import Images, Predict, Timestep


@dataclass(frozen=True)
class Latency:
    """Seconds of each measured network call; `blocks` has the median of each block of calls."""

    seconds: tuple[float, ...]
    blocks: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def minimum(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """A speed-up: the ratio of the medians, and the smallest and the largest ratio of neighbouring blocks."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": round(self.value, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def ratio(exact: Latency, other: Latency) -> Ratio:
    """Return how many times as fast `other` is as `exact`; their blocks were measured in turns (`in_turns`)."""
    value = exact.median / other.median
    each = [value, *(e / o for e, o in zip(exact.blocks, other.blocks, strict=True))]
    return Ratio(value, min(each), max(each))


def call_ratio(
    exact: Predict, quantized: Predict, x: Images, t: Timestep, *, repeats: int = 7
) -> tuple[float, float, float]:
    """Return (float seconds, quantized seconds, float / quantized) of one call of two networks: medians, in blocks."""
    mine, before = paired_latencies(exact, quantized, x, t, repeats)
    return before.median, mine.median, before.median / mine.median


def in_turns(nets: Sequence[Predict], x: Images, t: Timestep, *, repeats: int = 7, rounds: int = 1) -> list[Latency]:
    """Time one call of several networks, in blocks forwards and backwards: a drift affects all of them equally."""
    blocks_of: list[list[tuple[float, ...]]] = [[] for _ in nets]
    for i in (*range(len(nets)), *reversed(range(len(nets)))) * rounds:
        blocks_of[i].append(timed_block(nets[i], x, t, repeats))
    return [Latency(sum(blocks, ()), tuple(float(np.median(block)) for block in blocks)) for blocks in blocks_of]


def paired_latencies(
    exact: Predict, quantized: Predict, x: Images, t: Timestep, repeats: int
) -> tuple[Latency, Latency]:
    """Return the latencies (quantized, float) of one call, timed in the blocks float - quantized - float."""
    before, mine, after = (timed_block(net, x, t, repeats) for net in (exact, quantized, exact))
    return Latency(mine), Latency(before + after)


def timed_block(net: Predict, x: Images, t: Timestep, repeats: int) -> tuple[float, ...]:
    """Return the seconds of `repeats` calls. A call before them is not counted."""
    net(x, t)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        net(x, t)
        times.append(time.perf_counter() - start)
    return tuple(times)
