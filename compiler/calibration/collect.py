"""Folds the activations of network calls into summaries beside the calls themselves.

Summarizing what a call computed takes about half as long as the call, and needs nothing of the next one. So one thread
folds while the caller runs on: numpy and onnxruntime both work outside of the interpreter's lock most of the time.
There is one such thread and it takes the calls in their order, so the sums are to the last bit those of a plain loop.
One call may wait, no more: memory is that of two calls' values, however many samples there are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.signature import Timestep

from ..core.stats import Summary
from ..errors import StatsError

Values = Mapping[str, npt.NDArray[Any]]


class Collector:
    """Summaries by (name of a value, group of calls). A context manager: it has a thread.

    `axes` says for which values each channel is measured by itself, and along which axis; `squared` for which of
    those the sums of squares are taken, too. `summaries`, `channels` (extremes `[2, C]`) and `squares` (`[C]`) may be
    read after `settle`, and until the next `add`.
    """

    def __init__(self, axes: Mapping[str, int] | None = None, squared: Collection[str] = ()) -> None:
        self.summaries: dict[tuple[str, int], Summary] = {}
        self.channels: dict[tuple[str, int], npt.NDArray[np.float32]] = {}
        self.squares: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
        self._axes, self._squared = dict(axes or {}), frozenset(squared)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collect")
        self._waiting: Future[None] | None = None

    def add(self, group: int, timestep: Timestep, values: Values) -> None:
        """Fold one call's values, of any shape and number type, into a group. The arrays must not change afterwards.

        Raises StatsError when the call before it had computed NaN or infinity.
        """
        self.settle()
        self._waiting = self._thread.submit(self._fold, group, timestep, dict(values))

    def settle(self) -> None:
        """Wait until everything is folded in. Raises StatsError for values that are not finite."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.result()

    def _fold(self, group: int, timestep: Timestep, values: Values) -> None:
        for name, array in values.items():
            summary = self.summaries.setdefault((name, group), Summary())
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
        last = self._axes[key[0]] % array.ndim == array.ndim - 1  # tokens [..., C]; else feature maps [batch, C, ...]
        rows = array.reshape(-1, array.shape[-1]) if last else array.reshape(*array.shape[:2], -1)
        low, high = (rows.min(axis=0), rows.max(axis=0)) if last else (_each(np.min, rows), _each(np.max, rows))
        seen = self.channels.setdefault(key, np.stack([low, high]))
        np.minimum(seen[0], low, out=seen[0])
        np.maximum(seen[1], high, out=seen[1])
        if key[0] in self._squared:  # not `dot`: see Summary.add; nor a copy in float64: einsum casts piece by piece
            sums = np.einsum("nc,nc->c" if last else "bcn,bcn->c", rows, rows, dtype=np.float64)
            self.squares[key] = self.squares[key] + sums if key in self.squares else sums

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()


def _each(extreme: Callable[..., npt.NDArray[np.float32]], rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The extreme `[C]` of each channel of `[batch, C, rest]`: along memory first, which is ten times faster."""
    return extreme(extreme(rows, axis=2), axis=0)
