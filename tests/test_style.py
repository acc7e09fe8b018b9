"""What no linter checks: names with one meaning, no `assert` as control flow, text files in UTF-8 on every system."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from tools.rooms import ROOT, TOPS, sources

BEFORE_ENCODING = {"write_text": 1, "read_text": 0}  # positional arguments in front of the encoding
SHARED = {
    "main": "what mezzotint/io/children.py runs in a new process",
    "Quantizer": "what quantizes one value: as data of the plan, and as a torch module that trains it",
    "sample": "images from a bundle: the API, its command, and the loop of the runtime that both call",
}


def without_encoding(source: str) -> Iterator[int]:
    """Yield the lines that read or write a text file in the encoding of the system."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in BEFORE_ENCODING:
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            if not named and len(node.args) <= BEFORE_ENCODING[node.func.attr]:
                yield node.lineno


def asserts(source: str) -> Iterator[int]:
    """Yield the lines of the asserts: `python -O` leaves them out, and their messages name no node."""
    yield from (node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert))


def public_names(source: str) -> Iterator[str]:
    """Yield the public functions, classes and constants that a module defines."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names: list[ast.expr | str] = [node.name]
        elif isinstance(node, ast.Assign):
            names = list(node.targets)
        else:
            names = [node.target] if isinstance(node, ast.AnnAssign) else []
        plain = [name.id if isinstance(name, ast.Name) else name for name in names]
        yield from (name for name in plain if isinstance(name, str) and not name.startswith("_"))


def repeated(modules: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the public names that more than one module defines, with the modules; `modules` are (path, source)."""
    homes: dict[str, list[str]] = {}
    for path, source in modules:
        for name in dict.fromkeys(public_names(source)):
            homes.setdefault(name, []).append(path)
    return {name: paths for name, paths in homes.items() if len(paths) > 1}


def texts(*tops: str) -> list[tuple[str, str]]:
    """Return (path, source) of every file of some top folders."""
    return [(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in sources(ROOT, tops)]


def test_text_files_name_their_encoding() -> None:
    assert [f"{path}:{line}" for path, text in texts(*TOPS, "tools") for line in without_encoding(text)] == []


def test_nothing_is_asserted_outside_the_tests() -> None:
    assert [f"{path}:{line}" for path, text in texts(*TOPS) for line in asserts(text)] == []


def test_a_public_name_is_defined_once() -> None:
    """An alias is imported from where it is defined; another meaning has another name."""
    found = repeated(texts(*TOPS))
    assert {name: paths for name, paths in found.items() if name not in SHARED} == {}
    assert SHARED.keys() <= found.keys()


def test_planted_faults_are_reported() -> None:
    source = "p.write_text('a')\np.write_text('a', encoding='utf-8')\np.read_text()\np.read_text('utf-8')\n"
    assert list(without_encoding(source)) == [1, 3]
    assert list(asserts("def f(x):\n    assert x is not None\n")) == [2]
    modules = [("a.py", "A: int = 1\n_b = 2\ndef f(): ..."), ("b.py", "class A: ...\n_b = 3"), ("c.py", "f = 1")]
    assert repeated(modules) == {"A": ["a.py", "b.py"], "f": ["a.py", "c.py"]}
