"""The output of the command line: tables, JSON, errors and warnings."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mezzotint.runtime.errors import MezzotintError

out = Console()
err = Console(stderr=True)


def print_json(data: Any) -> None:
    """Print plain JSON on standard output, for programs."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output; markup in its cells is shown as it is."""
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    out.print(table)


def print_pairs(title: str, pairs: Mapping[str, Any]) -> None:
    """Print a table of two columns: names and values."""
    print_table(title, ("", ""), list(pairs.items()))


def print_error(error: MezzotintError) -> None:
    """Print the error, its place and its hint on standard error."""
    err.print(f"[bold red]error:[/] {escape(error.what)}", highlight=False, soft_wrap=True)
    if error.where:
        err.print(f"  where: {escape(error.where)}", highlight=False, soft_wrap=True)
    if error.hint:
        err.print(f"  what to do: {escape(error.hint)}", highlight=False, soft_wrap=True)


def print_warning(text: str) -> None:
    """Print a warning on standard error."""
    err.print(f"[bold yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)
