"""A wheel holds every room, also one that is built from a checkout whose links are text files, as on Windows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.rooms import LINKED, ROOT, TOPS, sources

BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


def modules() -> set[str]:
    """The files of the four top folders as a wheel names them."""
    names = [path.relative_to(ROOT).as_posix() for path in sources(ROOT, TOPS)]
    return {name if name.startswith("mezzotint/") else f"mezzotint/{name}" for name in names}


def test_pyproject_lists_every_room() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"([\w.]+)"', text.partition("\npackages = [")[2].partition("]")[0])
    assert sorted(listed) == sorted({str(Path(name).parent).replace("/", ".") for name in modules()})


@pytest.mark.parametrize("links", [True, False], ids=["links", "text-files"])
def test_a_wheel_is_whole(tmp_path: Path, links: bool) -> None:
    checkout, wheels = tmp_path / "checkout", tmp_path / "wheels"
    for top in (*TOPS, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / top).is_dir():
            shutil.copytree(ROOT / top, checkout / top, symlinks=True)
        else:
            shutil.copy(ROOT / top, checkout / top)
    if not links:
        for top in LINKED:
            (checkout / "mezzotint" / top).unlink()
            (checkout / "mezzotint" / top).write_text(f"../{top}", encoding="utf-8")
    wheels.mkdir()

    command = [sys.executable, "-c", BUILD, str(wheels)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if name.endswith(".py")} == modules()
    assets = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mezzotint/assets").rglob("*") if p.is_file()}
    assert assets | {"mezzotint/py.typed"} <= names
