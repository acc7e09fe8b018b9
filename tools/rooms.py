"""The rooms of the project and the arrows between them, read from the imports.

    python tools/rooms.py            print each room with the rooms that it imports
    python tools/rooms.py --draw     draw them into docs/architecture.svg
    python tools/rooms.py --check    exit code 1 when that drawing is not what the code says

A room is a folder of Python files. An arrow goes from the room that imports to the room that is imported. Functions
take the root of a tree, so that tests run them on small trees with one planted fault each.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("runtime", "compiler", "passes")  # top folders whose import name is mezzotint.<folder>
TOPS = (*LINKED, "mezzotint")
DRAWING = "docs/architecture.svg"
FRONT = ("mezzotint/__init__.py", "mezzotint/__main__.py")  # they open every room, and belong to none


@dataclass(frozen=True)
class Import:
    """One imported name: `module` is absolute; `lazy` when inside a function, or for type checkers only."""

    module: str
    line: int
    relative: bool
    lazy: bool

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]

    @property
    def top(self) -> str | None:
        """The top folder that is imported from; None for a foreign module."""
        parts = self.module.split(".")
        if parts[0] != "mezzotint":
            return None
        return parts[1] if len(parts) > 1 and parts[1] in LINKED else "mezzotint"


def sources(root: Path, tops: tuple[str, ...] = (*TOPS, "tests", "tools")) -> list[Path]:
    """Return all Python files of some top folders, each once (the links inside mezzotint/ are not followed)."""
    return sorted(
        path for top in tops for path in (root / top).rglob("*.py") if not any(p.is_symlink() for p in path.parents)
    )


def imports(root: Path, path: Path) -> list[Import]:
    """Return every import of a file: statements anywhere, `import_module("...")` and `__import__("...")`."""
    return list(_imports(_tree(path.read_text(encoding="utf-8")), _package(root, path), root, lazy=False))


def room_of(root: Path, path: Path) -> str:
    """Return the folder of a file relative to the root, such as "compiler/graph"."""
    return path.relative_to(root).parent.as_posix()


def file_of(root: Path, module: str) -> Path | None:
    """Return the file of one of our modules; None for a folder, a name inside a module and a foreign module."""
    base = _place(root, module)
    return next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None) if base else None


def arrows(root: Path) -> dict[str, set[str]]:
    """Room -> the other rooms that its files import."""
    found: dict[str, set[str]] = {}
    for path in sources(root, TOPS):
        if path.relative_to(root).as_posix() in FRONT:
            continue
        room = room_of(root, path)
        targets = {file_of(root, item.module) for item in imports(root, path)}
        found.setdefault(room, set()).update(room_of(root, file) for file in targets if file)
    return {room: targets - {room} for room, targets in found.items()}


def rings(arrows: dict[str, set[str]]) -> list[str]:
    """Return the rings among named things that refer to each other, as `a -> b -> a`."""
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in sorted(arrows.get(name, set())):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(arrows):
        visit(name, [])
    return found


def file_arrows(root: Path) -> dict[str, set[str]]:
    """File -> the other files that it imports, lazily or not."""
    found = {}
    for path in sources(root, TOPS):
        targets = {file_of(root, item.module) for item in imports(root, path)} - {path}
        found[path.relative_to(root).as_posix()] = {t.relative_to(root).as_posix() for t in targets if t}
    return found


def floors(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return rooms by height, the lowest first: a room stands one floor above the highest room that it imports."""
    height: dict[str, int] = {}

    def of(room: str) -> int:
        if room not in height:
            height[room] = 1 + max((of(target) for target in arrows.get(room, set())), default=-1)
        return height[room]

    stack: list[list[str]] = []
    for room in sorted(arrows):
        while len(stack) <= of(room):
            stack.append([])
        stack[of(room)].append(room)
    return stack


def direct(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the transitive reduction of the arrows: those that no longer way replaces."""
    reached: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in reached:
            targets = arrows.get(room, set())
            reached[room] = targets.union(*(reach(target) for target in targets)) if targets else set()
        return reached[room]

    return {
        room: {t for t in targets if not any(t in reach(other) for other in targets - {t})}
        for room, targets in arrows.items()
    }


def purpose(root: Path, room: str) -> str:
    """Return the first paragraph of a room's docstring."""
    docstring = ast.get_docstring(ast.parse((root / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


@cache
def _tree(source: str) -> ast.Module:
    return ast.parse(source, feature_version=(3, 10))


def _package(root: Path, path: Path) -> list[str]:
    folder = list(path.relative_to(root).parent.parts)
    return ["mezzotint", *folder] if folder[0] in LINKED else folder


def _imports(node: ast.AST, package: list[str], root: Path, *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, False, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = _absolute(package, child.level, child.module or "")
            # `from ..core import graph` imports a module, `from ..graph.ops import f, g` two names of one.
            inner = [f"{base}.{alias.name}" for alias in child.names]
            modules = {name if base == "mezzotint" or _is_module(root, name) else base for name in inner}
            yield from (Import(module, child.lineno, child.level > 0, lazy) for module in sorted(modules))
        elif isinstance(child, ast.Call):
            called, first = ast.unparse(child.func).rpartition(".")[2], child.args[0] if child.args else None
            name = first.value if isinstance(first, ast.Constant) else None
            if called in {"import_module", "__import__"} and isinstance(name, str):
                level = len(name) - len(name.lstrip("."))
                yield Import(_absolute(package, level, name[level:]), child.lineno, level > 0, lazy)
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"  # it is never run
        inside = lazy or typing_only or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, package, root, lazy=inside)


def _absolute(package: list[str], level: int, name: str) -> str:
    """Return the absolute name of `name` after `level` dots in a file of `package`."""
    above = package[: len(package) - level + 1] if level else []
    return ".".join([*above, name] if name else above)


def _place(root: Path, module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != "mezzotint":
        return None
    return root.joinpath(*parts[1:]) if len(parts) > 1 and parts[1] in LINKED else root.joinpath(*parts)


def _is_module(root: Path, name: str) -> bool:
    base = _place(root, name)
    return base is not None and (base.with_suffix(".py").is_file() or (base / "__init__.py").is_file())


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--draw", action="store_true", help="write docs/architecture.svg")
    what.add_argument("--check", action="store_true", help="change nothing; exit code 1 when the drawing would change")
    args = parser.parse_args(argv)
    if not (args.draw or args.check):
        for room, targets in sorted(arrows(root).items()):
            print(f"{room} -> {', '.join(sorted(targets)) or '-'}")
        return 0
    sys.path.insert(0, str(ROOT))  # as a script, this file's folder is on the path, not the root
    from tools.draw_rooms import draw

    file, drawing = root / DRAWING, draw(root)
    if file.is_file() and file.read_text(encoding="utf-8") == drawing:
        return 0
    print(f"{'differs' if args.check else 'written'}: {DRAWING}")
    if args.check:
        return 1
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(drawing, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
