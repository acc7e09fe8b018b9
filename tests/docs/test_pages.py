"""Names on hand-written pages exist: options, messages, errors, functions, JSON keys, public names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mezzotint
from mezzotint import doctor
from mezzotint.passes.recipes.files import load_recipe
from tests.helpers.docs_examples import ROOT
from tools.rooms import TOPS, sources

DOCS = ROOT / "docs"
PARTS = ("howto", "reference", "explanation")
HAND_WRITTEN = [ROOT / "README.md", *sorted(page for part in PARTS for page in (DOCS / part).glob("*.md"))]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def first_cells(page: Path, pattern: str = r"`([^`]+)`") -> list[str]:
    """Return what the pattern finds in the first cells of a page's tables."""
    rows = re.findall(r"^\| (`.*?) \|", text(page), re.M)
    return [name for row in rows for name in re.findall(pattern, row)]


def code() -> str:
    return "".join(text(path) for path in sources(ROOT, TOPS))


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    """Of `mezzotint`, as docs/commands.md lists them, or of the command line of another tool."""
    foreign = {"--extensions", "--node_data_paths", "--update-golden", "--local-dir", "--head", "--address"}
    foreign |= set(re.findall(r'"(--[a-z][\w-]+)"', text(ROOT / "tools/experiment.py")))
    options = set(re.findall(r"--[a-z][\w-]+", text(page)))
    assert options - foreign <= set(re.findall(r"--[a-z][\w-]+", text(DOCS / "commands.md")))


def test_messages_exist() -> None:
    messages, everything = first_cells(DOCS / "howto/troubleshooting.md"), code()
    assert len(messages) >= 10
    assert [message for message in messages if message not in everything] == []


def test_errors_exist() -> None:
    names, everything = first_cells(DOCS / "reference/errors.md"), code()
    assert len(names) >= 12
    assert [name for name in names if f"class {name}(" not in everything] == []


def test_the_walk_names_existing_functions() -> None:
    rows = re.findall(r"^\| .* \| (`.*) \| (.*) \|$", text(DOCS / "architecture.md"), re.M)
    assert len(rows) >= 14
    opened = []
    for place, functions in rows:
        files = re.findall(r"`([\w/.*]+)`", place)
        folder = files[0].rpartition("/")[0]
        paths = [file if "/" in file else f"{folder}/{file}" for file in files]
        opened += paths
        if all(path.endswith(".py") and "*" not in path for path in paths):
            body = "".join(text(ROOT / path) for path in paths)
            for name in re.findall(r"`(\w+)`", functions):
                assert re.search(rf"^(def|class) {name}\b", body, re.M), (place, name)
    assert len(opened) == len(set(opened))


def test_public_names_exist() -> None:
    named = set(first_cells(DOCS / "reference/python_api.md", r"`(\w+)"))
    assert named == set(mezzotint.__all__) - {"__version__"}


def test_json_keys_exist() -> None:
    keys = set(re.findall(r"`([a-z_]+)`", text(DOCS / "reference/json.md"))) - {"bench", "debug", "doctor", "null"}
    everything = code()
    assert [key for key in sorted(keys) if f'"{key}"' not in everything] == []
    assert set(doctor.examine()) <= keys


def test_manifest_keys_exist() -> None:
    keys, everything = first_cells(DOCS / "reference/bundle.md", r"`(\w+)`"), code()
    assert len(keys) >= 20
    assert [key for key in keys if f'"{key}"' not in everything] == []


def test_the_recipe_on_the_page_is_read(tmp_path: Path) -> None:
    block = re.search(r"```text\n(.*?)```", text(DOCS / "reference/recipe_yaml.md"), re.S)
    assert block is not None
    file = tmp_path / "recipe.yaml"
    file.write_text(block[1], encoding="utf-8")
    assert [step.name for step in load_recipe(str(file)).passes][-1] == "clean_qdq"
