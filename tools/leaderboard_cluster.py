"""Rows of a leaderboard on the workers of a cluster: recipes are independent, so each row is a piece.

The working folder lies on a disk that all machines share; on one machine it is any folder. The driver writes a row's
file when its row comes, so a run that was stopped goes on with the rows that are left. The driver measures the speeds.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.cluster.connection import open_cluster
from mezzotint.cluster.placement import Fetch
from mezzotint.progress import shown
from tools.leaderboard_model import FloatModel
from tools.leaderboard_page import Row

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class RowWork:
    """The options of a board; a piece is (recipe, width, eta), or a peer, and its result is the row."""

    options: dict[str, Any]
    threads: int

    def open(self, fetch: Fetch) -> Callable[[Any], Row]:
        """Return the function from a piece to its row. The float model and the reference are those of the driver."""
        board = importlib.import_module("tools.leaderboard").Board(argparse.Namespace(**self.options))
        return board.row  # type: ignore[no-any-return]


def save_rows(model: FloatModel, args: argparse.Namespace, waiting: Sequence[tuple[Path, Any]]) -> None:
    """Measure rows on the cluster of the options, and write each to its file when it comes. Raises ClusterError."""
    # A worker takes no rows from the record beside the page, and has no cluster of its own.
    own = {**vars(args), "folder": args.folder.absolute(), "page": args.folder.absolute() / "no-page.md"}
    own |= {"cluster": None, "model": _place(args.model), "reference": model.reference.path.absolute()}
    with shown() as report, open_cluster(args.cluster, args.threads, modules=(ROOT,)) as cluster:
        work = RowWork(own, cluster.threads)
        pieces = [piece for _, piece in waiting]
        for index, answer in cluster.answers(work, pieces, stage="rows", unit="rows", progress=report):
            answer.result.save(waiting[index][0])
            print(f"[{waiting[index][0].stem}] {answer.stamp.seconds:.0f} s on {answer.stamp.machine.host}", flush=True)


def _place(model: str) -> str:
    """Return a path that does not depend on the current folder; a name stays."""
    return str(Path(model).absolute()) if Path(model).exists() else model
