"""Every test has one need; the tables name what there is; a wrong marker is noticed while the test runs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tests.helpers import tiers


@pytest.mark.parametrize("table", tiers.TABLES)
def test_the_tables_name_what_there_is(table: str) -> None:
    files = [path.relative_to(tiers.TESTS).as_posix() for path in tiers.TESTS.rglob("test_*.py")]
    stale = [entry for entry in tiers.TABLES[table] if not any(file.startswith(entry) for file in files)]
    assert stale == []


@pytest.mark.parametrize(
    ("file", "fixtures", "need"),
    [
        ("runtime/test_tables.py", (), "pure"),
        ("runtime/test_session.py", ("tmp_path",), "onnxruntime"),
        ("runtime/test_session.py", ("unet",), "torch"),
        ("mezzotint/test_api.py", (), "torch"),
        ("mezzotint/test_api.py", ("unet", "chromium"), "browser"),
    ],
)
def test_the_largest_need_decides(file: str, fixtures: tuple[str, ...], need: str) -> None:
    assert tiers.need(file, frozenset(fixtures)) == need


def item(marker: str) -> pytest.Item:
    return SimpleNamespace(get_closest_marker=lambda name: name == marker)  # type: ignore[return-value]


def test_a_session_in_a_pure_test_is_noticed() -> None:
    import onnxruntime

    with tiers.check(item("pure")), pytest.raises(pytest.fail.Exception, match="marked pure"):
        onnxruntime.InferenceSession("model.onnx")


def test_torch_without_its_marker_is_noticed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch", raising=False)
        with pytest.raises(pytest.fail.Exception, match="it loads torch"), tiers.check(item("onnxruntime")):
            patch.setitem(sys.modules, "torch", SimpleNamespace())
