"""YAML with bounds."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.compiler.yaml_text import parse_yaml
from tests.helpers.hostile_texts import YAML

PLAIN = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PLAIN, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_plain_data_is_read_as_pyyaml_reads_it(data: Any) -> None:
    text = yaml.safe_dump(data)
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["2:4", "1:30.5", "-1:00"])
def test_numbers_with_colons_are_text(text: str) -> None:
    assert yaml.safe_load(text) != text, "YAML 1.1 counts minutes and seconds"
    assert parse_yaml(f"pattern: {text}") == {"pattern": text}
    assert parse_yaml(yaml.safe_dump({"pattern": text})) == {"pattern": text}


def test_aliases_and_merges_that_are_small() -> None:
    assert parse_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\ne: *x") == {
        "a": {"b": 1, "c": 2},
        "d": {"b": 3, "c": 2},
        "e": {"b": 1, "c": 2},
    }


@pytest.mark.parametrize(
    "text",
    [
        *(data.decode() for name, data in YAML.items()),
        *(
            "[" * 100_000,
            "{" * 100_000,
            "- " * 5_000 + "x",
            "a: 1\na: 2",
            ".nan",
            "-.inf",
            "9" * 5_000,
            "!!int " + "1:" * 50 + "1",
        ),
        *(
            "0x" + "f" * 60,
            "!!bool zz",
            "!!binary zz$",
            "!!float ''",
            "!!timestamp x",
            "=",
            "*x",
            "&a [&b [*a]]",
            "\x00",
        ),
        *('"\\ud800"', '"\\UFFFFFFFF"', "[", "x" * (2 << 20)),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_yaml_that_passes_a_bound(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_yaml(text)
