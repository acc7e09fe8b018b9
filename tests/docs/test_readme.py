"""The README's programs run as they are printed, and it stays short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.docs_examples import ROOT, run


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


@pytest.mark.slow
def test_the_readme(tmp_path: Path) -> None:
    assert run((ROOT / "README.md").read_text(encoding="utf-8"), tmp_path, ROOT) == 4
    assert (tmp_path / "out" / "shell.png").is_file()
