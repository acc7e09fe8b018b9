"""Writes the pages of docs/ that come from the code: recipes, passes, commands, modules and systems.

    python -m tools.docs            write them
    python -m tools.docs --check    exit code 1 when a page differs from the code, or has no source any more

A test runs the check, so a docstring and its page stay equal. The figures on the pages of recipes and
systems are those of the leaderboards.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mezzotint.compiler.core.pipeline import Pass, Recipe
from mezzotint.passes.recipes.catalog import DEFAULT, RECIPES
from mezzotint.passes.recipes.files import make_pass, pass_names, to_yaml
from tools.leaderboard_recipes import changed_options
from tools.rooms import purpose, room_of, sources
from tools.systems_page import systems_page

DOCS = Path(__file__).parents[1] / "docs"
TOPS = ("mezzotint", "passes", "compiler", "runtime", "tools")
TOOLS = "Programs for working on the project; nothing imports them but tests and each other."
GENERATED = "Written by `tools/docs.py`; do not edit.\n"
_ARXIV = re.compile(r"(?:arXiv )?\b(\d{4}\.\d{4,5})\b")
_TITLE = re.compile(r"^(\w+): (.+?)(?:\n\n|\Z)", re.S)


def pages() -> Iterator[tuple[str, str]]:
    """(place below docs/, text) of every page."""
    names, figures = measured(DOCS / "leaderboard.md")
    for recipe in RECIPES.values():
        yield f"recipes/{recipe.name}.md", recipe_page(recipe, figures.get(recipe.name, {}), names)
    yield "recipes/README.md", recipe_index()
    for name in pass_names():
        yield f"passes/{name}.md", pass_page(name)
    yield "passes/README.md", pass_index()
    yield "commands.md", commands()
    yield "modules.md", modules()
    yield "systems.md", systems_page(DOCS, GENERATED)


def recipe_page(recipe: Recipe, figures: dict[str, list[str]], columns: list[str]) -> str:
    about = [f"**{recipe.description}**\n"]
    if recipe.paper:
        about.append(f"From: {linked(recipe.paper)}.")
    if recipe.baseline:
        about.append(f"It is measured beside [`{recipe.baseline}`]({recipe.baseline}.md).")
    about.append(f"Kept in float: {', '.join(recipe.islands) or 'nothing'}.")
    rows = [
        f"| {i} | [`{step.name}`](../passes/{step.name}.md) | {heading(step.name)} | {changed(step)} |"
        for i, step in enumerate(recipe.passes, 1)
    ]
    parts = [
        f"# `{recipe.name}`",
        GENERATED,
        "\n".join(about),
        f"```\nmezzotint compile MODEL -o BUNDLE{'' if recipe.name == DEFAULT else f' --recipe {recipe.name}'}\n```",
        "## Passes\n\n| | pass | what it is for | options that are not its defaults |\n|---|---|---|---|\n"
        + "\n".join(rows),
    ]
    if figures:
        parts.append(
            "## Measured\n\nOn the embedded digits; the [leaderboard](../leaderboard.md) explains the columns.\n\n"
            f"| width | {' | '.join(columns[:9])} |\n|---{'|---' * len(columns[:9])}|\n"
            + "\n".join(f"| {width} | {' | '.join(cells[:9])} |" for width, cells in figures.items())
        )
    parts.append(
        f"## As a file\n\nA copy of this with changes is a recipe of your own.\n\n```yaml\n{to_yaml(recipe)}```"
    )
    return "\n\n".join(parts) + "\n"


def recipe_index() -> str:
    rows = [f"| [`{r.name}`]({r.name}.md) | {r.description} | {linked(r.paper) or '-'} |" for r in RECIPES.values()]
    table = "| recipe | what it does | from |\n|---|---|---|\n" + "\n".join(rows)
    about = "A recipe is a list of [passes](../passes/README.md) with their options."
    return f"# Recipes\n\n{GENERATED}\n{about}\n\n{table}\n"


def pass_page(name: str) -> str:
    made = make_pass(name)
    module, cls = importlib.import_module(type(made).__module__), type(made)
    users = [r.name for r in RECIPES.values() if any(step.name == name for step in r.passes)]
    types = {f.name: str(f.type) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    options = [f"| `{key}` | `{types[key].replace('|', chr(92) + '|')}` | `{v}` |" for key, v in made.options().items()]
    facts = [
        "Exact: the pipeline compares the graph with the one before."
        if made.tolerance is not None
        else "Not exact, or not a change of the graph.",
        *(f"{word}: {', '.join(f'`{fact}`' for fact in sorted(found))}." for word, found in order(made) if found),
    ]
    parts = [
        f"# `{name}`",
        GENERATED,
        prose(inspect.getdoc(module) or ""),
        "## Options\n\n" + prose(inspect.getdoc(cls) or "") if options else "It has no options.",
        "| option | type | default |\n|---|---|---|\n" + "\n".join(options) if options else "",
        "## In a recipe\n\n" + "\n".join(f"- {fact}" for fact in facts),
        "Used by " + ", ".join(f"[`{user}`](../recipes/{user}.md)" for user in users) + "."
        if users
        else "No named recipe uses it.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def pass_index() -> str:
    rows = [f"| [`{name}`]({name}.md) | {heading(name)} |" for name in pass_names()]
    return f"# Passes\n\n{GENERATED}\n| pass | what it is for |\n|---|---|\n" + "\n".join(rows) + "\n"


def commands() -> str:
    """Return typer's description of the command line."""
    line = [
        sys.executable,
        "-m",
        "typer",
        "mezzotint.cli.app",
        "utils",
        "docs",
        "--name",
        "mezzotint",
        "--title",
        "Commands",
    ]
    text = subprocess.run(line, capture_output=True, text=True, check=True, cwd=DOCS.parent, timeout=120).stdout
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{GENERATED}\n{rest.strip()}\n"


def modules() -> str:
    """Return every file with the first paragraph of its docstring, by room, under the room's purpose."""
    root = DOCS.parent
    rooms: dict[str, list[Path]] = {}
    for file in sources(root, TOPS):
        rooms.setdefault(room_of(root, file), []).append(file)
    sections = [f"# Modules\n\n{GENERATED}"]
    for room, files in sorted(rooms.items(), key=lambda item: (TOPS.index(item[0].partition("/")[0]), item[0])):
        about = purpose(root, room) if (root / room / "__init__.py").is_file() else TOOLS
        rows = [f"| `{file.name}` | {first_paragraph(file)} |" for file in files if file.name != "__init__.py"]
        table = "\n\n| file | what it is for |\n|---|---|\n" + "\n".join(rows) if rows else ""
        sections.append(f"{'#' * (2 + room.count('/'))} {room}/\n\n{about}{table}")
    return "\n\n".join(sections) + "\n"


def first_paragraph(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def heading(name: str) -> str:
    """Return the first sentence of a pass's module, without its name."""
    found = _TITLE.match(inspect.getdoc(importlib.import_module(f"mezzotint.passes.{name}")) or "")
    return " ".join(found[2].split()).rstrip(".") if found else ""


def changed(step: Pass) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in changed_options(step).items()) or "-"


def order(step: Pass) -> list[tuple[str, Any]]:
    return [("Needs", step.needs), ("Not after", step.before), ("Gives", step.gives), ("Spoils", step.spoils)]


def prose(docstring: str) -> str:
    """Return a docstring as Markdown: indented lines become blocks of plain text."""
    lines, inside = [], False
    for line in docstring.splitlines():
        indented = line.startswith("    ") or (inside and not line.strip())
        if indented and not inside:
            lines.append("```text")
        if inside and line.strip() and not line.startswith("    "):
            while lines[-1] == "":
                lines.pop()
            lines += ["```", ""]
        inside = indented or (inside and not line.strip())
        lines.append(line.removeprefix("    ") if inside else line)
    return "\n".join([*lines, *(["```"] if inside else [])])


def linked(text: str) -> str:
    """Return the text with arXiv numbers as links."""
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def measured(board: Path) -> tuple[list[str], dict[str, dict[str, list[str]]]]:
    """Return (the names of the leaderboard's columns, recipe -> width -> cells of its row)."""
    found: dict[str, dict[str, list[str]]] = {}
    columns: list[str] = []
    width = ""
    for line in board.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            width = line[3:]
        elif line.startswith("| recipe | "):
            columns = line.strip("| ").split(" | ")[1:]
        elif row := re.match(r"\| `([\w-]+)` \| (.*) \|$", line):
            found.setdefault(row[1], {})[width] = row[2].split(" | ")
    return columns, found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when a page would change")
    check = parser.parse_args(argv).check
    wanted = dict(pages())
    kept = {p.relative_to(DOCS).as_posix() for folder in ("recipes", "passes") for p in (DOCS / folder).glob("*.md")}
    stale = sorted(kept - set(wanted))
    wrong = [n for n, text in wanted.items() if not (DOCS / n).is_file() or (DOCS / n).read_text("utf-8") != text]
    for name in [*stale, *wrong]:
        print(f"{'differs' if check else 'written'}: docs/{name}")
    if check:
        return 1 if stale or wrong else 0
    for name in stale:
        (DOCS / name).unlink()
    for name in wrong:
        (DOCS / name).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / name).write_text(wanted[name], encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
