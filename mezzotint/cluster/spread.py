"""Pieces of a compilation on a cluster: what a pass computes through `Context.spread`."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mezzotint.compiler.core.context import PieceWork
from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.runtime.progress import Progress, silent

from .driver import Cluster
from .placement import CarriedFolder, Fetch, Machine, mixed_kinds, placed_folder, this_computer
from .record import MixedProcessors


class ClusterSpread:
    """The workers of a cluster, for passes. `progress` is that of the compilation."""

    def __init__(self, cluster: Cluster, progress: Progress = silent) -> None:
        self._cluster, self._progress = cluster, progress
        self._warned: set[str] = set()

    @property
    def threads(self) -> int:
        """The number of threads of each piece."""
        return self._cluster.threads

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
        """Yield the results of pieces in their order. Raises the refusal of a piece, and ClusterError for one given up.

        Warns where a piece was computed on another kind of processor than this one.
        """
        self._cluster.drop_missing()
        names = tuple(sorted(file.name for file in folder.iterdir()))
        carried = self._cluster.carried(folder, names, folder_digest(folder, names))
        shared = _FolderWork(carried, names, work, self.threads)
        progress = silent if unit is None else self._progress
        how: dict[str, Any] = {"stage": stage, "unit": unit or "pieces", "gpus": gpus, "progress": progress}
        for _, answer in self._cluster.answers(shared, pieces, ordered=True, needs_all=True, **how):
            self._warn_of(answer.stamp.machine)
            yield answer.result

    def _warn_of(self, machine: Machine) -> None:
        here = this_computer()
        words = mixed_kinds({"driver": here, "worker": machine})
        if words is not None and machine.kind not in self._warned:
            self._warned.add(machine.kind)
            warnings.warn(MixedProcessors(words), stacklevel=2)


@dataclass(frozen=True)
class _FolderWork:
    """The work of a pass, and the files that it reads."""

    folder: CarriedFolder
    names: tuple[str, ...]
    work: PieceWork
    threads: int

    def open(self, fetch: Fetch) -> Callable[[Any], Any]:
        place = placed_folder(self.folder, lambda folder: folder_digest(folder, self.names), fetch)
        _keep_only(place if place != Path(self.folder.path) else None)
        return self.work.open(place, self.threads)


_fetched: list[Path] = []  # at most one: what this worker's present work reads of the files that travelled


def _keep_only(place: Path | None) -> None:
    """Remove the files of the work before: a compilation has new ones for each stage, as large as the weights."""
    for before in _fetched:
        if before != place:
            shutil.rmtree(before, ignore_errors=True)
    _fetched[:] = [] if place is None else [place]


def folder_digest(folder: Path, names: Sequence[str]) -> str:
    """Return the SHA-256 of files of a folder with their names. Raises OSError for one that is missing."""
    digest = sha256()
    for name in names:
        digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()
