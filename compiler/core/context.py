"""What a pass may use besides the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.condition_network import ConditionNetwork
from mezzotint.runtime.sampling.guidance import rows_in_turn

from .cache import Cache

CPU = "cpu"


class PieceWork(Protocol):
    """What all pieces of some work share, as a value that is pickled."""

    def open(self, folder: Path, threads: int) -> Callable[[Any], Any]:
        """Return the function from a piece to its result. `folder` has the files that the work reads."""


class Spread(Protocol):
    """Other processes or machines that compute pieces of work, each in `threads` threads."""

    @property
    def threads(self) -> int: ...

    def in_order(
        self,
        work: PieceWork,
        folder: Path,
        pieces: Sequence[Any],
        stage: str,
        *,
        unit: str | None = "pieces",
        gpus: float = 0,
    ) -> Iterator[Any]:
        """Yield the results of pieces in their order. Workers have the files of `folder`, which must not change.

        Each piece asks for so many `gpus`, and finds them from the first on. Progress counts in `unit`; with None there
        is none, because the caller reports its own.
        """


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the program: the working folder, the calibration data, the number of threads.

    `conditions` maps each condition to an array `[rows, ...]`; calibration takes the rows in turn. `unconditional` has
    the rows `[1, ...]` of the unconditional half of a guided call; `condition_network` computes what changes from call
    to call. `cache` keeps statistics and what was trained (core/cache.py). Passes train on `device`, a CPU or a GPU.
    `spread` computes pieces of work on other processes or machines; without it they are computed here.
    """

    folder: Path
    seed: int = 0
    threads: int | None = None
    samples: int = 16
    batch: int = 8
    conditions: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    unconditional: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    progress: Progress = silent
    cache: Cache | None = None
    device: str = CPU
    condition_network: ConditionNetwork | None = None
    spread: Spread | None = None

    def condition_rows(self, first: int, rows: int) -> dict[str, npt.NDArray[Any]]:
        """Return `rows` rows of each condition from `first` on, starting over after the last one."""
        return rows_in_turn(self.conditions, first, rows)

    def for_workers(self) -> Context:
        """Return the parts that another process can have; it sets its own `folder` and `threads`."""
        return replace(self, folder=Path(), progress=silent, cache=None, spread=None)
