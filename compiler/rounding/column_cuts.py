"""Columns cut out of the inputs of a stage's layers, in one network call: what H is summed over."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mezzotint.runtime import streams
from mezzotint.runtime.arrays import Floats

from .gram import Unfold, choose_positions

GramKey = tuple[tuple[str, Unfold], ...]


class Readings(Protocol):
    """How the layers of a weight read their inputs: the values `taps`, in the float graph `read_as_float`.

    `key` identifies H: layers that read the same value in the same way share one.
    """

    @property
    def taps(self) -> tuple[str, ...]: ...

    @property
    def read_as_float(self) -> tuple[str, ...]: ...

    @property
    def unfolds(self) -> tuple[Unfold, ...]: ...

    @property
    def key(self) -> GramKey: ...


@dataclass(frozen=True)
class PlainReadings:
    """Readings without a graph, for other processes."""

    taps: tuple[str, ...]
    read_as_float: tuple[str, ...]
    unfolds: tuple[Unfold, ...]
    key: GramKey

    @classmethod
    def of(cls, readings: Readings) -> PlainReadings:
        """Return those of a weight."""
        return cls(readings.taps, readings.read_as_float, readings.unfolds, readings.key)


@dataclass(frozen=True, eq=False)
class ColumnCut:
    """Columns `[positions, groups, d]` of the weight `item` of a stage, `factor` times the layer's inputs.

    They count for H unless another weight with the same one has them (`counted`). `difference` is that of the float
    graph's columns, where it is wanted.
    """

    item: int
    columns: Floats
    factor: float
    counted: bool
    difference: Floats | None


def column_cuts(
    stage: Sequence[Readings],
    seen: Mapping[str, Floats],
    wanted: Mapping[str, Floats],
    limit: int,
    seed: Sequence[int],
    balance: bool,
) -> Iterator[ColumnCut]:
    """Yield the columns of one batch, at `limit` positions; those of a float input are cut at the same positions.

    `seen` are the inputs by name, `wanted` those of the float graph or empty.
    """
    added: set[GramKey] = set()
    for item, inputs in enumerate(stage):
        if inputs.key in added and not wanted:
            continue
        for tap, float_tap, unfold in zip(inputs.taps, inputs.read_as_float, inputs.unfolds, strict=True):
            x = seen[tap]
            rng = streams.POSITIONS.generator(*seed, zlib.crc32(tap.encode()))
            chosen = choose_positions(unfold.positions(x.shape), limit, rng)
            found = unfold.columns(x, chosen)
            mean = float(np.mean(np.square(found), dtype=np.float64))
            factor = np.float32(1 / np.sqrt(mean)) if balance and mean > 0 else np.float32(1)
            found *= factor
            difference = unfold.columns(wanted[float_tap], chosen) * factor - found if wanted else None
            yield ColumnCut(item, found, float(factor), inputs.key not in added, difference)
        added.add(inputs.key)
