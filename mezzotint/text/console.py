"""What the command line shows: progress, tables, errors."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from mezzotint.runtime.errors import MezzotintError

out = Console()
err = Console(stderr=True)
Reporter = Any  # (stage, done, total) -> None, see compiler/core/pipeline.py


def print_json(data: Any) -> None:
    """Plain JSON on standard output, for programs."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    out.print(table)


def print_pairs(title: str, pairs: Mapping[str, Any]) -> None:
    print_table(title, ("", ""), list(pairs.items()))


def print_error(error: MezzotintError) -> None:
    err.print(f"[bold red]error:[/] {escape(error.what)}", highlight=False, soft_wrap=True)
    if error.where:
        err.print(f"  where: {escape(error.where)}", highlight=False, soft_wrap=True)
    if error.hint:
        err.print(f"  what to do: {escape(error.hint)}", highlight=False, soft_wrap=True)


def print_warning(text: str) -> None:
    err.print(f"[bold yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Reporter]:
    """A reporter of (stage, done, total): bars on a terminal, one line for each finished stage elsewhere."""
    if quiet:
        yield lambda stage, done, total: None
    elif err.is_terminal:
        with _bars() as bars:
            yield _on_bars(bars)
    else:
        yield _on_lines()


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err
    )


def _on_bars(bars: Progress) -> Reporter:
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks or (done == 0 and bars.tasks[tasks[stage]].finished):
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    return report


def _on_lines() -> Reporter:
    started: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        started.setdefault(stage, now)
        if done >= total:
            err.print(f"{stage}: {total} done in {now - started.pop(stage):.1f} s", highlight=False, markup=False)

    return report
