"""The output of the command line: tables, JSON, errors and warnings. Nothing else prints.

Text of a model or of a file is data: its markup is not obeyed, and its control characters are shown as escapes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.visible import one_line, visible

out = Console()
err = Console(stderr=True)


class CellLines(tuple[str, ...]):
    """A cell of several lines."""


def print_json(data: Any) -> None:
    """Print plain JSON on standard output, for programs."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def print_line(text: str) -> None:
    """Print one line on standard output, without wrapping it."""
    out.print(visible(text, None), highlight=False, markup=False, soft_wrap=True)


def print_text(text: str) -> None:
    """Print a text of several lines on standard output, as it is."""
    for line in text.splitlines():
        print_line(line)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output. A CellLines has a line for each part."""
    table = Table(title=escape(visible(title)), title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(escape(visible(column)), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(cell) for cell in row))
    out.print(table)


def _cell(cell: Any) -> str:
    return escape("\n".join(visible(part) for part in (cell if isinstance(cell, CellLines) else (cell,))))


def print_pairs(title: str, pairs: Mapping[str, Any]) -> None:
    """Print a table of two columns: names and values."""
    print_table(title, ("", ""), list(pairs.items()))


def print_error(error: MezzotintError) -> None:
    """Print the error, its place and its hint on standard error, each on one line."""
    err.print(f"[bold red]error:[/] {escape(one_line(error.what))}", highlight=False, soft_wrap=True)
    if error.where:
        err.print(f"  where: {escape(one_line(error.where))}", highlight=False, soft_wrap=True)
    if error.hint:
        err.print(f"  what to do: {escape(one_line(error.hint))}", highlight=False, soft_wrap=True)


def print_warning(text: str) -> None:
    """Print a warning on standard error."""
    err.print(f"[bold yellow]warning:[/] {escape(one_line(text))}", highlight=False, soft_wrap=True)
