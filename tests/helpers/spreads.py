"""Workers for passes, without a cluster."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mezzotint.cluster.placement import CarriedFolder, Machine, this_computer
from mezzotint.cluster.tasks import Answer, Stamp


class Backwards:
    """A Spread that computes the last piece first, on what other processes would get: a pickled work, and files.

    `pieces` counts the pieces by stage.
    """

    threads = 1

    def __init__(self) -> None:
        self.pieces: dict[str, int] = {}

    def in_order(
        self,
        work: Any,
        folder: Path,
        pieces: Sequence[Any],
        stage: str,
        *,
        unit: str | None = "pieces",
        gpus: float = 0,
    ) -> Iterator[Any]:
        results = {}
        for i in reversed(range(len(pieces))):
            perform = pickle.loads(pickle.dumps(work)).open(folder, self.threads)
            results[i] = pickle.loads(pickle.dumps(perform(pickle.loads(pickle.dumps(pieces[i])))))
        self.pieces[stage] = self.pieces.get(stage, 0) + len(pieces)
        yield from (results[i] for i in range(len(pieces)))


class ClusterHere:
    """What a Cluster answers, from this process: the last piece first, on pickled work. `pieces` counts by stage."""

    threads = 1

    def __init__(self, machine: Machine | None = None) -> None:
        self.pieces: dict[str, int] = {}
        self._machine = this_computer() if machine is None else machine

    def carried(self, folder: Path, names: Sequence[str], digest: str) -> CarriedFolder:
        return CarriedFolder(str(folder.absolute()), digest)

    def drop_missing(self) -> None:
        pass

    def answers(
        self, work: Any, pieces: Sequence[Any], *, stage: str, ordered: bool = False, **_: Any
    ) -> Iterator[tuple[int, Answer]]:
        perform = pickle.loads(pickle.dumps(work)).open(lambda key: pytest.fail(f"{key} did not travel"))
        stamp = Stamp("here", self._machine, os.getpid(), 0.0, self.threads)
        found = {}
        for i in reversed(range(len(pieces))):
            found[i] = Answer(stamp, pickle.loads(pickle.dumps(perform(pickle.loads(pickle.dumps(pieces[i]))))))
        self.pieces[stage] = self.pieces.get(stage, 0) + len(pieces)
        yield from sorted(found.items()) if ordered else found.items()


def cluster_here(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> ClusterHere:
    """Let the `--cluster` of a module be this process."""
    cluster = ClusterHere()

    @contextmanager
    def opened(spec: str | None, threads: int | None = None) -> Iterator[ClusterHere | None]:
        yield None if spec is None else cluster

    monkeypatch.setattr(module, "check_cluster", lambda spec: None)
    monkeypatch.setattr(module, "cluster_or_none", opened)
    return cluster
