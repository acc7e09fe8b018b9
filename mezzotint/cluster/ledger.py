"""Which piece is handed out next, how often a piece was tried, and when a run is over. No process is started here.

The driver asks it on a real cluster, and tools/simulate_cluster.py on a simulated one.
"""

from __future__ import annotations

from collections import deque

from mezzotint.runtime.errors import MezzotintError

ATTEMPTS = 3
"""How often a piece may fail: by an error of its own, or by the death of its worker."""
LOSSES = 10
"""How often a piece may be lost with a whole machine, which is not the piece's fault."""


class ClusterError(MezzotintError):
    """Pieces of a run failed on a cluster until they were given up."""


class Ledger:
    """The pieces 0 .. count - 1 of one run.

    `window` bounds how far a piece may be ahead of the first one that is not over: results that are merged in the order
    of their pieces wait for it, and there are at most so many. None means no bound.
    """

    def __init__(self, count: int, window: int | None = None) -> None:
        self._waiting = deque(range(count))
        self._again: deque[int] = deque()
        self._window = window
        self._over = [False] * count
        self._first = 0  # the first piece that is not over
        self._left = count
        self.attempts = [0] * count
        self.losses = [0] * count
        self.failures: dict[int, str] = {}
        """The last error of each piece that was given up."""

    @property
    def is_over(self) -> bool:
        """Whether every piece is done or given up."""
        return self._left == 0

    def take(self) -> int | None:
        """Return the piece to hand out now: one that failed before others, else the next. None where there is none."""
        if self._again:
            return self._again.popleft()
        if not self._waiting or (self._window is not None and self._waiting[0] >= self._first + self._window):
            return None
        return self._waiting.popleft()

    def done(self, piece: int) -> None:
        """Note that a piece has its result."""
        self.attempts[piece] += 1
        self._close(piece)

    def failed(self, piece: int, error: str, *, lost: bool = False) -> bool:
        """Note that a piece has none, and return whether it is tried again. `lost` says that its machine was lost."""
        counts, most = (self.losses, LOSSES) if lost else (self.attempts, ATTEMPTS)
        counts[piece] += 1
        if counts[piece] < most:
            self._again.append(piece)
            return True
        self.failures[piece] = error
        self._close(piece)
        return False

    def _close(self, piece: int) -> None:
        self._over[piece] = True
        self._left -= 1
        while self._first < len(self._over) and self._over[self._first]:
            self._first += 1
