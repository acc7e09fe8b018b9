"""docs/add_a_method.md: its pass, recipe and test work in a copy of the repository."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers.docs_examples import ROOT, run


def test_add_a_method(tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    left_out = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "out", "*.egg-info")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    assert run((ROOT / "docs" / "add_a_method.md").read_text("utf-8"), copy, copy) >= 8
