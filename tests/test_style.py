"""What no linter checks: text files are UTF-8 on every system."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tools.rooms import ROOT, TOPS, sources

BEFORE_ENCODING = {"write_text": 1, "read_text": 0}  # positional arguments in front of the encoding


def without_encoding(source: str) -> Iterator[int]:
    """The lines that read or write a text file in the encoding of the system."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in BEFORE_ENCODING:
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            if not named and len(node.args) <= BEFORE_ENCODING[node.func.attr]:
                yield node.lineno


def places(path: Path, lines: Iterator[int]) -> list[str]:
    return [f"{path.relative_to(ROOT).as_posix()}:{line}" for line in lines]


def test_text_files_name_their_encoding() -> None:
    found = [p for f in sources(ROOT, (*TOPS, "tools")) for p in places(f, without_encoding(f.read_text("utf-8")))]
    assert found == []


def test_a_planted_file_without_encoding_is_reported() -> None:
    source = "p.write_text('a')\np.write_text('a', encoding='utf-8')\np.read_text()\np.read_text('utf-8')\n"
    assert list(without_encoding(source)) == [1, 3]
