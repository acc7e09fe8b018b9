"""The progress of a run over all workers: what is done, how fast, what is left, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mezzotint.runtime.progress import DETAIL, Progress


class Pace:
    """Reports each piece that is done to one stage of `progress`, with the rate, the time left and core-hours."""

    def __init__(self, sizes: Sequence[int], unit: str, stage: str, threads: int, progress: Progress) -> None:
        self._sizes, self._unit, self._stage, self._threads = sizes, unit, stage, threads
        self._progress = progress
        self._done, self._total = 0, sum(sizes)
        self._busy = 0.0  # seconds of all pieces
        self._started = time.perf_counter()
        progress(stage, 0, self._total)

    def done(self, piece: int, seconds: float) -> None:
        """Note a piece that took so many seconds of its worker, times its cores as a share of the usual number."""
        self._done += self._sizes[piece]
        self._busy += seconds
        self._progress(f"{self._stage}{DETAIL}{self.text()}", self._done, self._total)

    def text(self) -> str:
        """Return the rate, the seconds left and the cost so far, for display."""
        rate = self._done / max(time.perf_counter() - self._started, 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if self._done < self._total else ""
        return f"{rate:.3g} {self._unit}/s{left}, {self._busy * self._threads / 3600:.2g} core-hours"
