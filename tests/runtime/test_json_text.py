"""JSON and text with bounds, and what may be shown."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.json_text import parse_json, read_json
from mezzotint.runtime.visible import LONGEST, one_line, visible

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_json_is_read_as_it_was_written(data: Any) -> None:
    assert parse_json(json.dumps(data)) == data


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[NaN]", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("[1e400]", "too large"),
        ("9" * 5_000, "64 bits"),
        (str(2**64), "64 bits"),
        ("[" * 150 + "]" * 150, "deeper than 100"),
        ("[" * 200_000, "deeper than 100"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' is there twice"),
        (r'["\ud800"]', "surrogate"),
        ("[1,]", "line 1"),
        ("", "line 1"),
    ],
)
def test_json_that_passes_a_bound(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    if "Infinity" in text:
        assert parse_json(text, infinite=True) == [float("-inf")]


def test_files_that_are_no_text(tmp_path: Path) -> None:
    bad = {"bytes": b"\xff{}", "large": b" " * 2_000, "zero": b"\x00"}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "mark").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "mark", "it", InputError, most=1_000) == {}
    for name in (*bad, ".", "none", "x" * 300):
        with pytest.raises(InputError, match=r"^it ") as caught:
            read_json(tmp_path / name, "it", InputError, most=1_000)
        assert caught.value.where == str(tmp_path / name)


@given(st.text(st.characters()))
def test_what_is_shown_has_nothing_hidden(text: str) -> None:
    for shown in (visible(text), one_line(text)):
        assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
        assert len(shown) <= 10 * LONGEST + 60
    if text.isascii() and text.isprintable() and len(text) <= LONGEST:
        assert visible(text) == text


def test_a_long_text_keeps_its_ends() -> None:
    shown = visible("a" * 5_000 + "b" * 5_000)
    assert shown.startswith("aaa")
    assert shown.endswith("bbb")
    assert len(shown) < LONGEST + 60
