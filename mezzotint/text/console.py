"""The output of the command line: tables, JSON, errors and warnings. Nothing else prints.

Text of a model or of a file is data: its markup is not obeyed, and its control characters are shown as escapes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.visible import one_line, visible

out = Console(emoji=False)
err = Console(stderr=True, emoji=False)
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
READ = 40  # the width of text in a table that is wider than the terminal


class CellLines(tuple[str, ...]):
    """A cell of several lines."""


def print_json(data: Any) -> None:
    """Print plain JSON on standard output, for programs."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def print_line(text: str) -> None:
    """Print one line on standard output, without wrapping it."""
    out.print(visible(text, None), **_PLAIN)


def print_text(text: str) -> None:
    """Print a text of several lines on standard output, as it is."""
    for line in text.splitlines():
        print_line(line)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, most: int | None = None, more: str = "--all"
) -> None:
    """Print a table on standard output. A CellLines has a line for each part.

    No word is broken, because names are copied into options: a table that does not fit has no frame, and its lines are
    longer than the terminal. With `most` further rows are counted, and `more` says what prints them.
    """
    shown = [[_text(cell) for cell in row] for row in (rows if most is None else rows[:most])]
    title, columns = visible(title), [visible(column) for column in columns]
    by_column = list(zip(columns, *shown, strict=True))
    least = [max(map(_longest_word, column)) for column in by_column]
    wanted = [max(cell_len(line) for cell in column for line in [*cell.splitlines(), ""]) for column in by_column]
    room = out.width - 3 * len(columns) - 1
    if sum(least) <= room:
        table = Table(title=escape(title), title_justify="left", header_style="bold")
        for column, width in zip(columns, _allotted(least, wanted, room), strict=True):
            table.add_column(escape(column), width=width)
        for row in shown:
            table.add_row(*map(escape, row))
        out.print(table)
    else:
        _print_wide(title, columns, shown, [max(a, min(b, READ)) for a, b in zip(least, wanted, strict=True)])
    if len(shown) < len(rows):
        print_line(f"... and {len(rows) - len(shown)} more: {more}")


def _allotted(least: Sequence[int], wanted: Sequence[int], room: int) -> list[int]:
    """Return the widths of columns: at least their longest words, and what is left to those that want little more."""
    widths, spare = list(least), room - sum(least)
    for place, index in enumerate(sorted(range(len(least)), key=lambda i: wanted[i] - least[i])):
        more = min(max(0, wanted[index] - least[index]), spare // (len(least) - place))
        widths[index] += more
        spare -= more
    return widths


def _print_wide(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    """Print a table without a frame, whose lines are as long as its names need."""
    out.print(title, style="italic", **_PLAIN)
    for row in (columns, *rows):
        cells = [Text(cell).wrap(out, width) for cell, width in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            parts = [cell[i].plain if i < len(cell) else "" for cell in cells]
            line = "  ".join(set_cell_size(part, width) for part, width in zip(parts, widths, strict=True))
            out.print(line.rstrip(), style="bold" if row is columns else None, **_PLAIN)


def _longest_word(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=0)


def _text(cell: Any) -> str:
    return "\n".join(visible(part) for part in (cell if isinstance(cell, CellLines) else (cell,)))


def print_pairs(title: str, pairs: Mapping[str, Any]) -> None:
    """Print a table of two columns: names and values. A value whose words do not fit is printed behind the table."""
    room = out.width - 7 - max(map(cell_len, pairs), default=0)
    long = {name: _text(value) for name, value in pairs.items() if _longest_word(_text(value)) > room}
    print_table(title, ("", ""), [pair for pair in pairs.items() if pair[0] not in long])
    for name, value in long.items():
        print_text(f"{visible(name)}: {value}")


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
