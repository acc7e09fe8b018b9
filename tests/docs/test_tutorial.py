"""The tutorial runs as it stands, and an example that fails is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.docs_examples import ROOT, run


def test_the_tutorial(tmp_path: Path) -> None:
    assert run((ROOT / "docs" / "tutorial.md").read_text("utf-8"), tmp_path, ROOT) >= 15
    assert "<script" in (tmp_path / "out" / "digits.html").read_text("utf-8")


def test_an_example_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run("```python\n1 / 0\n```\n", tmp_path, ROOT)
    with pytest.raises(AssertionError, match="there is no such folder"):
        run("```sh\nmezzotint inspect out/nothing\n```\n", tmp_path, ROOT)
    with pytest.raises(AssertionError, match="marked as text"):
        run("```yaml\na: 1\n```\n", tmp_path, ROOT)
    assert run("```text\nmezzotint inspect out/nothing\n```\n", tmp_path, ROOT) == 0
