"""Workers for passes, without a cluster."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class Backwards:
    """A Spread that computes the last piece first, on what other processes would get: a pickled work, and files.

    `pieces` counts the pieces by stage.
    """

    threads = 1

    def __init__(self) -> None:
        self.pieces: dict[str, int] = {}

    def in_order(
        self, work: Any, folder: Path, pieces: Sequence[Any], stage: str, *, unit: str | None = "pieces"
    ) -> Iterator[Any]:
        results = {}
        for i in reversed(range(len(pieces))):
            perform = pickle.loads(pickle.dumps(work)).open(folder, self.threads)
            results[i] = pickle.loads(pickle.dumps(perform(pickle.loads(pickle.dumps(pieces[i])))))
        self.pieces[stage] = self.pieces.get(stage, 0) + len(pieces)
        yield from (results[i] for i in range(len(pieces)))
