"""The arrows of the house, enforced by reading the imports: passes -> compiler -> runtime, one door per dependency.

`violations`, `cycles` and `long_files` take the root of a tree, so that the same functions run on this repository and
on small trees with one planted fault each.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("runtime", "compiler", "passes")  # the folders whose import name is mezzotint.<folder>
RECIPES = ("recipes.py", "recipe_files.py", "recipe_papers.py", "recipe_parts.py")  # what may import passes
LONGEST = 320  # lines of a file outside tests/

TORCH = frozenset({"torch", "diffusers", "transformers", "accelerate"})
NEWER = frozenset({"tomllib"})  # in the standard library, but not in that of Python 3.10
# What the door may load only inside a function: none of it is needed to print a help text.
HEAVY = TORCH | {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "networkx", "scipy", "matplotlib"}


@dataclass(frozen=True)
class Rule:
    """What one room may import: other rooms, libraries, and libraries that only certain files may."""

    rooms: frozenset[str]
    libraries: frozenset[str]
    doors: dict[str, frozenset[str]]  # file name -> libraries that no other file of the room imports


RULES = {
    "runtime": Rule(
        rooms=frozenset({"runtime"}),
        libraries=frozenset({"numpy", "safetensors"}),
        doors={
            "session.py": frozenset({"onnxruntime"}),
            "diffusers_unet.py": frozenset({"torch", "diffusers"}),
            "diffusers_scheduler.py": frozenset({"torch", "diffusers"}),
        },
    ),
    "compiler": Rule(
        rooms=frozenset({"runtime", "compiler"}),
        libraries=frozenset(
            {"numpy", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "psutil", "pydantic", "yaml"}
        ),
        doors={
            "import_torch.py": TORCH,
            "torch_example.py": TORCH,
            "reference.py": TORCH,
            "topology.py": frozenset({"networkx"}),
            "gram.py": frozenset({"scipy"}),
            "rounding.py": frozenset({"scipy"}),
            "allocation.py": frozenset({"scipy"}),
            "noise_report.py": frozenset({"scipy"}),
            "noise_plot.py": frozenset({"matplotlib"}),
        },
    ),
    "passes": Rule(
        rooms=frozenset({"runtime", "compiler"}),  # other passes: only what has recipes, see `_room_problem`
        libraries=frozenset({"numpy", "onnx_ir"}),
        doors={"recipe_files.py": frozenset({"pydantic", "yaml"})},
    ),
}


@dataclass(frozen=True)
class Import:
    """One imported name: `module` is absolute; `lazy` when inside a function, or for type checkers only."""

    module: str
    line: int
    relative: bool
    lazy: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def room(self) -> str | None:
        """The room that is imported from, `door` for mezzotint itself, None for what is not ours."""
        parts = self.module.split(".")
        if parts[0] != "mezzotint":
            return None
        return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "door"


def sources(root: Path) -> list[Path]:
    """All Python files of the house, each once (the links inside mezzotint/ are not followed)."""
    files = [path for folder in (*ROOMS, "tests", "tools") for path in (root / folder).rglob("*.py")]
    return sorted(files + list((root / "mezzotint").glob("*.py")))


def imports(root: Path, path: Path) -> list[Import]:
    """Every import of a file: statements anywhere, `import_module("...")` and `__import__("...")`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
    return list(_imports(tree, _package(root, path), root, lazy=False))


def _package(root: Path, path: Path) -> list[str]:
    folder = list(path.relative_to(root).parent.parts)
    return ["mezzotint", *folder] if folder[0] in ROOMS else folder


def _imports(node: ast.AST, package: list[str], root: Path, *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, False, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = _absolute(package, child.level, child.module or "")
            # `from .. import compiler` imports a module, `from ..ops import f, g` two names of one.
            inner = [f"{base}.{alias.name}" for alias in child.names]
            modules = {name if base == "mezzotint" or _file_of(root, name) else base for name in inner}
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
    """The absolute name of what a file of `package` calls `name` after `level` dots."""
    above = package[: len(package) - level + 1] if level else []
    return ".".join([*above, name] if name else above)


def _file_of(root: Path, module: str) -> Path | None:
    """The file of one of our modules; None for a package, for a name inside a module and for what is not ours."""
    parts = module.split(".")
    if parts[0] != "mezzotint":
        return None
    base = root.joinpath(*parts[1:]) if len(parts) > 1 and parts[1] in ROOMS else root.joinpath(*parts)
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def violations(root: Path) -> list[str]:
    """Every import that the table of the architecture forbids, as `file:line: what is wrong`."""
    found = []
    for path in sources(root):
        name = path.relative_to(root)
        for item in imports(root, path):
            problem = _problem(name, item)
            if problem:
                found.append(f"{name.as_posix()}:{item.line}: {problem}")
    return found


def _problem(name: Path, item: Import) -> str | None:
    folder = name.parts[0]
    if item.top in ROOMS:
        return f"`{item.module}` is no import name; it is mezzotint.{item.module}"
    if folder in {"tests", "tools"}:
        return "tests and tools import by absolute names" if item.relative else None
    if folder == "mezzotint":
        return f"the door imports {item.top} lazily only" if item.top in HEAVY and not item.lazy else None
    rule = RULES[folder]
    if item.room is not None:
        return _room_problem(name, item, rule)
    allowed = rule.libraries | rule.doors.get(name.name, frozenset())
    if item.top in allowed or item.top in sys.stdlib_module_names - NEWER:
        return None
    doors = sorted(file for file, libraries in rule.doors.items() if item.top in libraries)
    return f"{folder}/ does not import {item.top}" + (f", except {', '.join(doors)}" if doors else "")


def _room_problem(name: Path, item: Import, rule: Rule) -> str | None:
    folder = name.parts[0]
    if not item.relative:
        return "imports inside the house are relative"
    if folder == "passes" and item.room == "passes":
        return None if name.name in RECIPES else "a pass does not import another pass (recipes.py does)"
    if item.room not in rule.rooms:
        return f"{folder}/ does not import {'the door' if item.room == 'door' else f'{item.room}/'}"
    return None


def cycles(root: Path) -> list[str]:
    """Rings of modules that import each other, lazily or not, as `a -> b -> a`."""
    arrows: dict[Path, set[Path]] = {}
    for path in sources(root):
        if path.relative_to(root).parts[0] not in {"tests", "tools"}:
            targets = {_file_of(root, item.module) for item in imports(root, path)}
            arrows[path] = {target for target in targets if target and target != path}
    done: set[Path] = set()
    found: list[str] = []

    def visit(path: Path, trail: list[Path]) -> None:
        if path in trail:
            ring = [*trail[trail.index(path) :], path]
            found.append(" -> ".join(file.relative_to(root).as_posix() for file in ring))
        elif path not in done:
            for target in sorted(arrows.get(path, set())):
                visit(target, [*trail, path])
            done.add(path)

    for path in sorted(arrows):
        visit(path, [])
    return found


def long_files(root: Path) -> list[str]:
    """Files outside tests/ that are longer than the house allows, as `file: lines`."""
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)}
    return [
        f"{path.relative_to(root).as_posix()}: {lines}"
        for path, lines in sizes.items()
        if lines > LONGEST and path.relative_to(root).parts[0] != "tests"
    ]


def loaded_after(statement: str) -> set[str]:
    """The top-level modules that a fresh Python has loaded after a statement."""
    code = f"{statement}\nimport sys; print(*sorted(name for name in sys.modules if '.' not in name))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_every_import_is_allowed() -> None:
    assert violations(ROOT) == []


def test_modules_form_no_ring() -> None:
    assert cycles(ROOT) == []


def test_files_are_short() -> None:
    assert long_files(ROOT) == []


def test_the_checker_reads_the_whole_house() -> None:
    """Guards against a checker that passes because it found nothing to read."""
    read = {path.relative_to(ROOT).as_posix() for path in sources(ROOT)}
    assert {"runtime/errors.py", "compiler/program.py", "tools/train_digits.py", "tests/test_architecture.py"} <= read
    assert not any(name.startswith(("mezzotint/compiler/", "mezzotint/passes/", "mezzotint/runtime/")) for name in read)


@pytest.mark.parametrize(
    ("statement", "never"),
    [
        ("import mezzotint", HEAVY),
        ("import mezzotint.cli", HEAVY),
        ("import mezzotint.runtime.bundle", TORCH | {"onnx", "onnx_ir", "onnxscript", "networkx"}),
        ("import mezzotint.passes.recipes", TORCH),
        ("import mezzotint.diffusers", TORCH),
    ],
)
def test_importing_loads_no_more_than_it_needs(statement: str, never: Sequence[str]) -> None:
    assert loaded_after(statement) & set(never) == set()


def test_the_probe_for_loaded_modules_sees_them() -> None:
    assert {"safetensors", "numpy"} <= loaded_after("import safetensors.numpy")


CLEAN = {
    "runtime/__init__.py": "",
    "runtime/tables.py": "import json\nimport numpy as np\nfrom safetensors.numpy import load_file",
    "runtime/session.py": "import onnxruntime as ort\nfrom . import tables",
    "runtime/diffusers_unet.py": "import torch\nfrom diffusers import ModelMixin\nfrom . import tables",
    "compiler/__init__.py": "",
    "compiler/graph.py": "import onnx_ir as ir\nfrom ..runtime.tables import nearest",
    "compiler/import_torch.py": "def run():\n    import torch.export, diffusers\n    from .graph import text",
    "compiler/topology.py": "import networkx as nx",
    "passes/__init__.py": "",
    "passes/normalize.py": "import onnx_ir\nfrom ..compiler import graph",
    "passes/recipes.py": "from .normalize import Normalize",
    "passes/recipe_files.py": "import yaml\nfrom .recipes import RECIPES",
    "mezzotint/__init__.py": "def load():\n    import torch\n    from .compiler.graph import text",
    "tests/test_tables.py": "import torch\nfrom mezzotint.runtime import tables",
    "tools/bench.py": "import onnxruntime\nfrom mezzotint.compiler import graph",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in {**CLEAN, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="utf-8")
    return root


def test_a_clean_tree_has_no_violations(tmp_path: Path) -> None:
    root = plant(tmp_path, {})
    assert (violations(root), cycles(root), long_files(root)) == ([], [], [])


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        (
            "runtime/tables.py",
            "import torch",
            "runtime/ does not import torch, except diffusers_scheduler.py, diffusers_unet.py",
        ),
        ("runtime/diffusers_unet.py", "import transformers", "runtime/ does not import transformers"),
        ("runtime/tables.py", "import onnx", "runtime/ does not import onnx"),
        ("runtime/tables.py", "import onnxruntime", "runtime/ does not import onnxruntime, except session.py"),
        ("runtime/tables.py", "from ..compiler import graph", "runtime/ does not import compiler/"),
        ("runtime/tables.py", "from ..passes.normalize import Normalize", "runtime/ does not import passes/"),
        ("runtime/tables.py", "from .. import __version__", "runtime/ does not import the door"),
        (
            "compiler/graph.py",
            "import torch.fx",
            "compiler/ does not import torch, except import_torch.py, reference.py",
        ),
        ("compiler/graph.py", "from diffusers import UNet2DModel", "compiler/ does not import diffusers"),
        ("compiler/graph.py", "import networkx", "compiler/ does not import networkx, except topology.py"),
        ("compiler/topology.py", "import torch", "compiler/ does not import torch"),
        ("compiler/graph.py", "import onnxruntime", "compiler/ does not import onnxruntime"),
        ("compiler/graph.py", "from ..passes import normalize", "compiler/ does not import passes/"),
        ("compiler/graph.py", "from ..cli import app", "compiler/ does not import the door"),
        ("compiler/graph.py", "import mezzotint", "imports inside the house are relative"),
        ("compiler/graph.py", "from mezzotint.runtime import tables", "imports inside the house are relative"),
        ("compiler/graph.py", "import runtime.tables", "is no import name; it is mezzotint.runtime.tables"),
        ("compiler/graph.py", "import importlib; importlib.import_module('torch')", "compiler/ does not import torch"),
        ("compiler/graph.py", "import_module('..passes.normalize', __package__)", "compiler/ does not import passes/"),
        ("compiler/graph.py", "__import__('onnxruntime')", "compiler/ does not import onnxruntime"),
        ("compiler/graph.py", "import tomllib", "compiler/ does not import tomllib"),
        ("compiler/graph.py", "import scipy.stats", "compiler/ does not import scipy, except allocation.py"),
        ("passes/normalize.py", "import onnxruntime", "passes/ does not import onnxruntime"),
        ("passes/normalize.py", "import diffusers", "passes/ does not import diffusers"),
        ("passes/normalize.py", "import networkx", "passes/ does not import networkx"),
        ("passes/normalize.py", "import torch", "passes/ does not import torch"),
        ("passes/normalize.py", "from .recipes import RECIPES", "a pass does not import another pass"),
        ("passes/normalize.py", "from . import recipes", "a pass does not import another pass"),
        ("passes/normalize.py", "import yaml", "passes/ does not import yaml, except recipe_files.py"),
        ("passes/normalize.py", "from torch import fx, nn", "passes/ does not import torch"),
        ("passes/recipes.py", "import torch", "passes/ does not import torch"),
        ("passes/normalize.py", "from ..cli import app", "passes/ does not import the door"),
        ("mezzotint/__init__.py", "import torch", "the door imports torch lazily only"),
        (
            "mezzotint/__init__.py",
            "from onnxruntime import InferenceSession",
            "the door imports onnxruntime lazily only",
        ),
        ("tests/test_tables.py", "from compiler import graph", "is no import name; it is mezzotint.compiler"),
        ("tests/test_tables.py", "from .helpers import near", "tests and tools import by absolute names"),
        ("tools/bench.py", "import passes.normalize", "is no import name; it is mezzotint.passes.normalize"),
    ],
)
def test_a_planted_import_is_reported(tmp_path: Path, name: str, line: str, problem: str) -> None:
    found = violations(plant(tmp_path, {name: f"{CLEAN[name]}\n{line}"}))
    assert len(found) == 1, found
    assert found[0].startswith(f"{name}:{CLEAN[name].count(chr(10)) + 2}: ")
    assert problem in found[0]


@pytest.mark.parametrize(
    "body",
    [
        "def f():\n    import torch",
        "class A:\n    def f(self):\n        if self:\n            from torch import fx",
        "if TYPE_CHECKING:\n    import torch",
        "try:\n    import torch\nexcept ImportError:\n    torch = None",
        "async def f():\n    import torch",
    ],
)
def test_a_hidden_import_is_reported(tmp_path: Path, body: str) -> None:
    found = violations(plant(tmp_path, {"runtime/tables.py": body}))
    assert len(found) == 1 and "runtime/ does not import torch" in found[0], found


@pytest.mark.parametrize("lazily", ["from .graph import text", "def f():\n    from . import graph"])
def test_a_planted_ring_is_reported(tmp_path: Path, lazily: str) -> None:
    files = {"compiler/graph.py": "from .ops import traits", "compiler/ops.py": lazily}
    assert cycles(plant(tmp_path, files)) == ["compiler/graph.py -> compiler/ops.py -> compiler/graph.py"]


def test_a_planted_long_file_is_reported(tmp_path: Path) -> None:
    many = "\n".join(["a = 1"] * LONGEST)
    files = {"passes/normalize.py": many, "tools/bench.py": many + "\na = 1", "tests/test_tables.py": many * 2}
    assert long_files(plant(tmp_path, files)) == ["tools/bench.py: 321"]


def test_syntax_newer_than_python_3_10_is_refused(tmp_path: Path) -> None:
    root = plant(tmp_path, {"runtime/tables.py": "try:\n    pass\nexcept* ValueError:\n    pass"})
    with pytest.raises(SyntaxError):
        violations(root)
