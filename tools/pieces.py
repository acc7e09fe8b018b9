"""Rows that are measured piece by piece, here or on the workers of a cluster: each is a file when it is there.

A run that was stopped goes on with the rows that are left. Working folders lie on a disk that all machines share; on
one machine they are any folder. The driver writes a row's file when its row comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.cluster.connection import open_cluster
from mezzotint.cluster.tasks import Work
from mezzotint.progress import shown
from mezzotint.runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """A row that is wanted: its file, the piece that it is measured from, and its name for display."""

    file: Path
    piece: Any
    label: str


def fill(make: Callable[[], Work], jobs: Sequence[Job], cluster: str | None) -> None:
    """Measure the rows of `jobs` and write their files, each when it is there.

    `make` prepares the work of all pieces; it is called when there are any. Its results have `save(file)`. `cluster` is
    as `--cluster`; None measures one row after the other in this process. Raises the errors of the work, ClusterError.
    """
    if not jobs:
        return
    work = make()
    if cluster is None:
        measure = work.open(_travels)
        for i, job in enumerate(jobs):
            print(f"[{i + 1}/{len(jobs)}] {job.label}", flush=True)
            measure(job.piece).save(job.file)
        return
    pieces = [job.piece for job in jobs]
    with shown() as report, open_cluster(cluster, work.threads, modules=(ROOT,)) as opened:
        for index, answer in opened.answers(work, pieces, stage="rows", unit="rows", progress=report):
            answer.result.save(jobs[index].file)
            print(f"[{jobs[index].label}] {answer.stamp.seconds:.0f} s on {answer.stamp.machine.host}", flush=True)


def _travels(key: str) -> Any:
    raise InputError(f"no file travels to a row that is measured here, and {key} was asked for")
