"""Boards are filled: their rows as pieces, here or on workers, and the page of each with its record."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mezzotint.cluster.placement import Fetch
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.session import running_version
from tools.leaderboard_board import Board, Piece
from tools.leaderboard_options import BoardOptions
from tools.leaderboard_page import Row, page
from tools.leaderboard_record import write_record
from tools.pieces import Job, fill


@dataclass(frozen=True)
class BoardsWork:
    """The options of boards; a piece is (board, row), and its result is the row."""

    boards: tuple[BoardOptions, ...]
    threads: int

    def open(self, fetch: Fetch) -> Callable[[tuple[int, Piece]], Row]:
        """Return the function from a piece to its row. One board is open at a time: each has its float network."""
        opened: dict[int, Board] = {}

        def measure(piece: tuple[int, Piece]) -> Row:
            index, row = piece
            if index not in opened:
                opened.clear()
                opened[index] = Board(self.boards[index])
            return opened[index].row(row)

        return measure


def fill_boards(
    boards: Sequence[Board], cluster: str | None, *, titles: Sequence[str] = (), again: bool = False
) -> None:
    """Measure the rows of the boards that are not there, or with `again` all of them. Raises as `fill` does.

    All boards have the same number of threads. `titles` tell their rows apart in what is printed.
    """
    jobs = []
    for index, board in enumerate(boards):
        title = f"{titles[index]}: " if titles else ""
        jobs += [Job(f, (index, piece), title + f.stem) for f, piece, done in board.wanted() if again or not done]

    def make() -> BoardsWork:
        for index in sorted({job.piece[0] for job in jobs}):
            boards[index].prepare()
        return BoardsWork(tuple(map(_of_worker, boards)), boards[0].args.threads)

    fill(make, jobs, cluster)


def _of_worker(board: Board) -> BoardOptions:
    """Return options that do not depend on the current folder. A worker takes no rows from the page's record."""
    args, folder = board.args, board.folder.absolute()
    places: dict[str, Any] = {
        name: type(path)(_place(str(path)))
        for name in ("model", "scheduler", "conditions", "unconditional")
        if (path := getattr(args, name)) is not None
    }
    reference = folder / "reference"
    return replace(args, **places, folder=folder, page=folder / "no-page.md", reference=reference)


def _place(name: str) -> str:
    """Return a path that does not depend on the current folder; a name stays."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def write_page(board: Board) -> None:
    """Write the page of a board and the record beside it, from all rows that were measured with its options."""
    args = board.args
    rows = [row for _, row in board.listed()]
    if left := len(list(board.rows.glob("*.json"))) - len(rows):
        print(f"{left} rows of other options, models or recipes are not on the page", flush=True)
    about = f"{board.model.deployment}, {board.images} images from the same noise, {args.calibration} others for "
    about += f"calibration, onnxruntime {running_version()}, {args.threads} threads, batch {args.batch}"
    text = page(rows, args.name, about, RECIPES, args.eta)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    write_record(args.page, rows, RECIPES)
    partial = args.page.with_suffix(f".{os.getpid()}")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(args.page)
