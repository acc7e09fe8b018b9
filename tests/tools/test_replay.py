"""tools/replay.py runs what a failed compile still had before it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mezzotint.compiler.core import pipeline, snapshot
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError
from mezzotint.passes.recipes.catalog import RECIPES

TOOL = Path(__file__).parents[2] / "tools" / "replay.py"


class Breaks(Pass):
    """A pass that fails, in front of those that would have come."""

    def run(self, program: Program, context: Context) -> Program:
        raise ZeroDivisionError("planted")


@pytest.fixture(scope="module")
def replay() -> ModuleType:
    spec = importlib.util.spec_from_file_location("replay", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MEASURED = [p.name for p in RECIPES["w8a8"].passes].index("observe") + 1


@pytest.fixture
def failed(tiny: Program, context: Context, tmp_path: Path) -> Path:
    """What a compile leaves when a pass breaks after calibration; the broken pass is then taken off the list."""
    passes = RECIPES["w8a8"].passes
    folder = tmp_path / "out.failed"
    with pytest.raises(PassError, match="planted"):
        pipeline.run_passes(tiny, [*passes[:MEASURED], Breaks(), *passes[MEASURED:]], context, reproducer=folder)
    program, pending = snapshot.load_program(folder)
    assert [p["pass"] for p in pending] == ["breaks", *(p.name for p in passes[MEASURED:])]
    fixed = tmp_path / "fixed.failed"
    snapshot.save_program(program, fixed, pending=pending[1:])
    return fixed


def test_the_pending_passes_run(replay: ModuleType, failed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = failed.parent / "dump"
    assert replay.main([str(failed), "--dump", str(dump)]) == 0
    assert "replayed 3 passes" in capsys.readouterr().out
    assert [f.name for f in sorted(dump.glob("*.onnx"))] == [
        f"{MEASURED + i:03d}_{name}.onnx"
        for i, name in enumerate(("imported", "choose_scales", "insert_qdq", "clean_qdq"))
    ]


def test_only_some_of_them_run(replay: ModuleType, failed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(failed), "--only", "1"]) == 0
    out = capsys.readouterr().out
    assert "choose_scales" in out and "insert_qdq" not in out


def test_a_folder_without_a_program_is_refused(
    replay: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay.main([str(tmp_path)]) == 2
    assert "holds no saved program" in capsys.readouterr().err
