"""Work for the workers of a cluster. They import this file, so it is outside of the tests' own modules."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.cluster.placement import Fetch
from mezzotint.runtime.errors import InputError


@dataclass(frozen=True)
class Square:
    """The square of a piece; what happens before is chosen by the piece: see `square`."""

    folder: str
    delays: tuple[float, ...] = ()
    fatal: tuple[int, ...] = ()
    failing: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    once: tuple[int, ...] = ()
    threads: int = 1

    def open(self, fetch: Fetch) -> Callable[[int], Any]:
        return self.square

    def square(self, piece: int) -> Any:
        """Wait, then end this process (`fatal` always, `once` the first time), fail, refuse, or return the square."""
        attempt = len(list(Path(self.folder).glob(f"{piece}-*")))
        Path(self.folder, f"{piece}-{attempt}-{os.getpid()}").touch()
        if self.delays:
            time.sleep(self.delays[piece % len(self.delays)])
        if piece in self.fatal or (piece in self.once and attempt == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if piece in self.failing:
            raise OSError(f"no luck with {piece}")
        if piece in self.refused:
            raise InputError(f"piece {piece} cannot be", where="here", hint="leave it out")
        return piece * piece


@dataclass(frozen=True)
class Surroundings:
    """Where a worker's modules come from, and its variables."""

    threads: int = 2

    def open(self, fetch: Fetch) -> Callable[[str], Any]:
        return lambda name: (str(sys.modules[name].__file__), os.environ.get("OMP_NUM_THREADS"))
