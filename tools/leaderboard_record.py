"""The rows of a leaderboard's page as a file beside it, of its name and with the ending .json.

Rows lie in the working folder while a board is measured, and such a folder goes with its machine. The record stays with
the page, with the PSNR of each image: a row that is added elsewhere is compared with the baseline image by image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mezzotint.runtime.errors import InputError
from tools.leaderboard_page import Recipes, Row, gain_of


def record_of(page: Path) -> Path:
    return page.with_suffix(".json")


def read_record(page: Path) -> list[Row]:
    """Return the rows that the page was written from; none where it has no record.

    Raise InputError for a file that is no record.
    """
    try:
        return [Row.of_json(row) for row in json.loads(record_of(page).read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        hint = "take it from the repository again, or delete it with its page"
        raise InputError(
            f"the record of the page cannot be read: {error}", where=str(record_of(page)), hint=hint
        ) from error


def write_record(page: Path, rows: Sequence[Row], recipes: Recipes) -> None:
    """Write the rows, each with its gain over its baseline, one a line."""
    known = {row.place: row for row in rows}
    kept = [replace(row, gain=gain_of(row, known, recipes)) for row in sorted(rows, key=lambda row: row.place)]
    lines = [json.dumps(asdict(_rounded(row))) for row in kept]
    partial = page.with_suffix(f".json.{os.getpid()}")
    partial.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8", newline="\n")
    partial.replace(record_of(page))


def _rounded(row: Row) -> Row:
    """Return the row with images to 0.01 dB: intervals are resampled from them, and tables show 0.1 dB."""
    return replace(row, images=tuple(None if db is None else round(db, 2) for db in row.images))
