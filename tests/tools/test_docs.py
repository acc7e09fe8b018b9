"""tools/docs.py: the pages in docs/ are what the code says now."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs", ROOT / "tools" / "docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--check"]) == 0, f"run: python -m tools.docs: {capsys.readouterr().out}"


def test_a_page_that_differs_is_named_and_written_again(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"recipes/a.md": "a\n", "passes/b.md": "b\n"}
    monkeypatch.setattr(tool, "DOCS", tmp_path)
    monkeypatch.setattr(tool, "pages", wanted.items)
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
    capsys.readouterr()
    (tmp_path / "passes/b.md").write_text("another")
    (tmp_path / "recipes/old.md").write_text("of a recipe that is gone")
    assert tool.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == ["differs: docs/recipes/old.md", "differs: docs/passes/b.md"]
    assert tool.main([]) == 0
    assert {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*.md")} == wanted


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"], ids=lambda page: page.name)
def test_links_of_the_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).is_file(), target


def test_the_drawing_of_the_flow_names_existing_files() -> None:
    named = re.findall(r"\b(?:compiler|passes|runtime)/[\w/]+\.py\b", (ROOT / "docs/flow.svg").read_text("utf-8"))
    assert len(named) >= 5
    assert all((ROOT / name).is_file() for name in named), named


def test_indented_lines_become_blocks(tool: ModuleType) -> None:
    text = "words\n\n    a = b\n\n    c = d\n\nmore\n\n    end"
    assert tool.prose(text) == "words\n\n```text\na = b\n\nc = d\n```\n\nmore\n\n```text\nend\n```"
