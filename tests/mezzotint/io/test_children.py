"""Nothing in the current folder runs, and nothing is written to the user's home."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mezzotint.evaluate.memory import memory_of_one_call
from mezzotint.io.children import absolute_paths, run_isolated
from tests.helpers.models import Compiled
from tools.rooms import ROOT, TOPS, sources

PLANTED = (
    *("__future__", "typing", "json", "logging", "psutil", "numpy", "onnx", "onnxruntime", "rich"),
    *("safetensors", "typer", "click", "yaml", "PIL", "scipy", "pydantic", "ml_dtypes", "sitecustomize2", "images"),
)
STARTERS = {"subprocess", "multiprocessing", "ProcessPoolExecutor", "pty", "asyncio"}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files of the names of modules; each leaves a mark when it runs."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in PLANTED:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / f'ran_{name}')!r}, 'w').close()\nraise SystemExit(3)\n"
        )
    (folder / "typing").mkdir()
    (folder / "typing" / "__init__.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(folder)
    return folder


def ran(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.glob("ran_*"))


def test_a_planted_module_would_run(planted: Path) -> None:
    """Guards against a test that passes because nothing looks into the current folder."""
    subprocess.run([sys.executable, "-c", "import numpy"], check=False, stderr=subprocess.DEVNULL)
    assert ran(planted) == ["ran_numpy"]


@pytest.mark.parametrize("paths", ["", os.pathsep, f"{os.pathsep}/nowhere"])
def test_the_memory_probe(hand: Compiled, planted: Path, monkeypatch: pytest.MonkeyPatch, paths: str) -> None:
    monkeypatch.setenv("PYTHONPATH", paths)
    memory = memory_of_one_call(hand.bundle, [hand.bundle.model_path], 1, threads=1)
    assert 0 < memory.added < memory.peak
    assert ran(planted) == []


def test_a_child_takes_this_copy_of_the_package_and_keeps_pythonpath(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe_of_the_path.py").write_text(
        "import mezzotint, os, sys\n"
        "def main(word):\n"
        "    print(word, mezzotint.__file__, os.getcwd() in sys.path, '' in sys.path)\n"
    )
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("PYTHONPATH", tmp_path.name)
    done = run_isolated("probe_of_the_path", "word")
    assert done.stdout.split() == ["word", str(ROOT / "mezzotint" / "__init__.py"), "False", "False"], done.stderr
    assert absolute_paths(f"{os.pathsep}a{os.pathsep}{os.pathsep}") == str(tmp_path.parent / "a")


def test_the_command_started_as_a_module(planted: Path, tmp_path: Path) -> None:
    """`python -m mezzotint` has the current folder first on its path until the package is found."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    environment.pop("CI", None)  # where it is set, OpenVINO's telemetry is off anyway
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "mezzotint", "doctor", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    assert ran(planted) == []
    assert list((tmp_path / "home").rglob("*")) == [], "telemetry begins when an engine is imported"


@pytest.mark.parametrize("options", [["-m", "own.program"], ["-um", "own.program"], ["-W", "ignore", "-mown.program"]])
def test_another_program_keeps_its_path(tmp_path: Path, options: list[str]) -> None:
    """A package that imports Mezzotint while `python -m` starts it finds its neighbours in the current folder."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("import mezzotint\nimport neighbour\n")
    (tmp_path / "own" / "program.py").write_text("from own import neighbour\nprint(neighbour.NAME)\n")
    (tmp_path / "neighbour.py").write_text("NAME = 'found'\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *options, "mezzotint"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "found\n", done.stderr


def test_no_other_place_starts_processes() -> None:
    """A child that is started elsewhere would have to be isolated there as well."""
    starters = set()
    for path in sources(ROOT, TOPS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            system = {"system", "popen", "posix_spawn", "fork"}
            owner = node.value if isinstance(node, ast.Attribute) and node.attr in system else None
            if STARTERS & set(names) or (isinstance(owner, ast.Name) and owner.id == "os"):
                starters.add(path.relative_to(ROOT).as_posix())
    assert starters == {"mezzotint/io/children.py"}
