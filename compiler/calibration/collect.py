"""Summaries of the activations of network calls, computed in a thread while the next call runs.

Summarizing the values of a call takes about half as long as the call and does not need the next one. numpy and
onnxruntime mostly work outside of the interpreter's lock, so the thread and the caller run at the same time. The one
thread takes the calls in order: its sums equal those of a plain loop to the last bit. At most one call waits, so memory
holds the values of two calls, for any number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.signature import Timestep

from ..core.stats import RecordedSummary, Summary
from ..errors import StatsError

Values = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class CollectedPart:
    """What was collected of some calls: summaries, extremes `[2, C]`, and the sums of squares `[C]` of each call."""

    summaries: Mapping[tuple[str, int], RecordedSummary]
    channels: Mapping[tuple[str, int], npt.NDArray[np.float32]]
    squares: Mapping[tuple[str, int], list[npt.NDArray[np.float64]]]


class Collector:
    """Summaries by (name of a value, group of calls). A context manager, because it has a thread.

    `axes` maps the values that are measured by channel to their channel axis. `squared` names those among them whose
    sums of squares are measured too. `summaries`, `channels` (extremes `[2, C]`) and `squares` (`[C]`) may be read
    between `settle` and the next `add`.

    A collector that is `recorded` keeps each addend as well, in `part`: `replay` adds parts that were collected
    elsewhere with the same bits as if their calls had been added here.
    """

    def __init__(
        self, axes: Mapping[str, int] | None = None, squared: Collection[str] = (), *, recorded: bool = False
    ) -> None:
        self._recorded = recorded
        self._addends: dict[tuple[str, int], list[npt.NDArray[np.float64]]] = {}
        self.summaries: dict[tuple[str, int], Summary] = {}
        self.channels: dict[tuple[str, int], npt.NDArray[np.float32]] = {}
        self.squares: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
        self._axes, self._squared = dict(axes or {}), frozenset(squared)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collect")
        self._waiting: Future[None] | None = None

    def add(self, group: int, timestep: Timestep, values: Values) -> None:
        """Add one call's values, of any shape and number type, to a group. The arrays must not change afterwards.

        Raises StatsError when the call before this one computed NaN or infinite values.
        """
        self.settle()
        self._waiting = self._thread.submit(self._fold, group, timestep, dict(values))

    def part(self) -> CollectedPart:
        """Return everything that a recorded collector has, once its calls are settled."""
        summaries = {key: value for key, value in self.summaries.items() if isinstance(value, RecordedSummary)}
        return CollectedPart(summaries, self.channels, self._addends)

    def replay(self, part: CollectedPart) -> None:
        """Add a part. Parts are added in the order of their calls."""
        for key, summary in part.summaries.items():
            self.summaries.setdefault(key, Summary()).replay(summary)
        for key, extremes in part.channels.items():
            self._add_extremes(key, *extremes)
        for key, addends in part.squares.items():
            for sums in addends:
                self._add_squares(key, sums)

    def settle(self) -> None:
        """Wait until every call is added. Raises StatsError for NaN or infinite values."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.result()

    def _fold(self, group: int, timestep: Timestep, values: Values) -> None:
        for name, array in values.items():
            summary = self.summaries.setdefault((name, group), RecordedSummary() if self._recorded else Summary())
            summary.add(np.asarray(array, np.float32))
            if not summary.finite:
                raise StatsError(
                    f"the float model computes NaN or infinite values at timestep {timestep}",
                    where=f"value {name}",
                    hint="check the model in float32 before quantizing it",
                )
            if name in self._axes:
                self._fold_channels((name, group), np.asarray(array, np.float32))

    def _fold_channels(self, key: tuple[str, int], array: npt.NDArray[np.float32]) -> None:
        last = self._axes[key[0]] % array.ndim == array.ndim - 1  # tokens [..., C], not feature maps [batch, C, ...]
        rows = array.reshape(-1, array.shape[-1]) if last else array.reshape(*array.shape[:2], -1)
        low, high = (rows.min(axis=0), rows.max(axis=0)) if last else (_each(np.min, rows), _each(np.max, rows))
        self._add_extremes(key, low, high)
        if key[0] in self._squared:  # einsum casts in blocks, without a float64 copy; not `dot`: see Summary.add
            self._add_squares(key, np.einsum("nc,nc->c" if last else "bcn,bcn->c", rows, rows, dtype=np.float64))

    def _add_extremes(self, key: tuple[str, int], low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> None:
        seen = self.channels.setdefault(key, np.stack([low, high]))
        np.minimum(seen[0], low, out=seen[0])
        np.maximum(seen[1], high, out=seen[1])

    def _add_squares(self, key: tuple[str, int], sums: npt.NDArray[np.float64]) -> None:
        self.squares[key] = self.squares[key] + sums if key in self.squares else sums
        if self._recorded:
            self._addends.setdefault(key, []).append(sums)

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()


def _each(extreme: Callable[..., npt.NDArray[np.float32]], rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the extreme `[C]` of each channel of `[batch, C, rest]`: along memory first, which is ten times faster."""
    return extreme(extreme(rows, axis=2), axis=0)
