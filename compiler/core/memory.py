"""Peak resident memory of a block of code, by sampling."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """A context manager whose `peak_mb` is the largest resident set while it was open, in megabytes (1e6 bytes).

    The high-water mark of the system cannot be reset: it would charge each pass with the largest one before it.
    """

    INTERVAL = 0.05  # seconds between samples

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _sample(self) -> None:
        self.peak_mb = max(self.peak_mb, self._process.memory_info().rss / 1e6)

    def _watch(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            self._sample()

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
