"""Tables: names are never broken, long tables are cut with a count, and a group of options has a title."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mezzotint.cli.app import compile_
from mezzotint.cli.panels import PANELS
from mezzotint.text import console
from mezzotint.text.report import MOST_ROWS
from tests.mezzotint.test_options import names

WORDS = st.text("abc/._-:[0]", min_size=1, max_size=90)


def printed(width: int, rows: Sequence[tuple[str, ...]], columns: tuple[str, ...], most: int | None = None) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "out", Console(width=width, emoji=False))
        with console.out.capture() as shown:
            console.print_table("title", columns, rows, most=most)
    return shown.get()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(WORDS, st.lists(WORDS, max_size=8).map(" ".join)), min_size=1, max_size=5),
    st.integers(20, 120),
)
def test_no_word_is_broken(rows: list[tuple[str, ...]], width: int) -> None:
    text = printed(width, rows, ("layer", "why it is so"))

    words = [word for row in rows for cell in row for word in cell.split()]
    shown = text.replace("\u2502", " ").split()
    assert sorted(words) == sorted(word for word in shown if word in words)


def test_a_table_that_fits_is_as_wide_as_the_terminal_at_most() -> None:
    rows = [("name", "many words of a reason that need several lines of the terminal to be read"), ("x", "y")]
    assert max(map(len, printed(40, rows, ("layer", "why")).splitlines())) <= 40


def test_long_tables_are_cut_with_a_count() -> None:
    rows = [(f"layer.{i}",) for i in range(MOST_ROWS + 7)]
    text = printed(80, rows, ("layer",), MOST_ROWS)

    assert "layer.9" in text and "layer.10" not in text and "... and 7 more: --all" in text
    assert "more" not in printed(80, rows, ("layer",))


def test_a_value_that_does_not_fit_is_printed_whole_behind_the_table() -> None:
    digest = "0123456789abcdef" * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "out", Console(width=60))
        with console.out.capture() as shown:
            console.print_pairs("bundle", {"digest of the bundle": digest, "recipe": "w8a8"})
    assert f"digest of the bundle: {digest}" in shown.get().replace("\n", " ")


def test_the_options_of_compile_are_in_groups() -> None:
    grouped = {name for panel in PANELS.values() for name in panel}
    assert names(compile_) - grouped <= {"model", "sets"}
    assert grouped - names(compile_) <= {"set_", "input_", "help"}, "a group names an option that does not exist"
