"""Pieces of a compilation on a cluster: what a pass computes through `Context.spread`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mezzotint.compiler.core.context import PieceWork
from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.runtime.progress import Progress, silent

from .driver import Cluster
from .placement import CarriedFolder, Fetch, placed_folder


class ClusterSpread:
    """The workers of a cluster, for passes. `progress` is that of the compilation."""

    def __init__(self, cluster: Cluster, progress: Progress = silent) -> None:
        self._cluster, self._progress = cluster, progress

    @property
    def threads(self) -> int:
        """The number of threads of each piece."""
        return self._cluster.threads

    def in_order(self, work: PieceWork, folder: Path, pieces: Sequence[Any], stage: str) -> Iterator[Any]:
        """Yield the results of pieces in their order. Raises the refusal of a piece, and ClusterError."""
        names = tuple(sorted(file.name for file in folder.iterdir()))
        carried = self._cluster.carried(folder, names, folder_digest(folder, names))
        shared = _FolderWork(carried, names, work, self.threads)
        answers = self._cluster.answers(
            shared, pieces, stage=stage, unit="batches", ordered=True, progress=self._progress
        )
        for _, answer in answers:
            yield answer.result


@dataclass(frozen=True)
class _FolderWork:
    """The work of a pass, and the files that it reads."""

    folder: CarriedFolder
    names: tuple[str, ...]
    work: PieceWork
    threads: int

    def open(self, fetch: Fetch) -> Callable[[Any], Any]:
        place = placed_folder(self.folder, lambda folder: folder_digest(folder, self.names), fetch)
        return self.work.open(place, self.threads)


def folder_digest(folder: Path, names: Sequence[str]) -> str:
    """Return the SHA-256 of files of a folder with their names. Raises OSError for one that is missing."""
    digest = sha256()
    for name in names:
        digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()
