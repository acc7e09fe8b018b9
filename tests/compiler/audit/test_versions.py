"""The integer kernels of each lowering, in the graphs that the oldest and the newest supported onnxruntime build.

Which groups fuse is decided by rules that change with onnxruntime's versions, silently: a group that does not fuse runs
in float. The oldest version lies in a folder of the environment (tools/setup_venv.py), for a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from mezzotint import compile_model
from mezzotint.compiler.audit.kernels import FLOAT_KERNELS, INTEGER_KERNELS
from mezzotint.runtime.session import TESTED_ONNXRUNTIME, running_version
from tests.helpers.models import SMALL, Compiled
from tests.helpers.tiny import ATTENTIONS, CONVS, LINEARS, tiny_model

ROOT = Path(__file__).parents[3]
ENDS = {"insert_qdq.islands": ["first", "last"]}
SPELLINGS: dict[str, dict[str, Any]] = {
    "qdq": {"recipe": "w8a8"},
    "integer": {"recipe": "w8a8-steps", "settings": ENDS},
}
ISLANDS = 2  # the first and the last convolution
# The unet: 22 convolutions, and four attentions of 4 linear layers and 2 matmuls each.
INTEGER = {"tiny": CONVS + LINEARS + ATTENTIONS, "unet": 22 + 4 * (4 + 2)}
# Builds the graphs of models, and runs each on the inputs beside it.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime
from mezzotint.runtime.session import open_session
folder = Path(sys.argv[1])
for model in sys.argv[2:]:
    name = Path(model).stem
    session = open_session(model, threads=1, optimized=folder / f"{name}.onnx")
    given = np.load(Path(model).with_suffix(".npz"))
    np.save(folder / name, session.run(None, {n: given[n] for n in given.files})[0])
print(onnxruntime.__version__)
"""


def setup_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "tools" / "setup_venv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OLDEST: str = setup_tool().OLDEST_ONNXRUNTIME
OLDEST_FOLDER = Path(sys.prefix) / setup_tool().OLDEST_FOLDER


@pytest.fixture(scope="module")
def models(unet: Compiled, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models in each lowering, `<model>-<spelling>.onnx`, and inputs of a call in `<model>-<spelling>.npz`."""
    folder = tmp_path_factory.mktemp("spellings")
    source = folder / "source.onnx"
    ir.save(tiny_model(), source)
    made = {}
    rng = np.random.default_rng(2)
    for model, file in (("tiny", source), ("unet", unet.exported)):
        for spelling, options in SPELLINGS.items():
            name = f"{model}-{spelling}"
            bundle = compile_model(file, folder / name, **options, **SMALL | {"threads": 1}, size=(8, 8))
            made[name] = bundle.model_path.rename(folder / f"{name}.onnx")
            signature = bundle.manifest.signature
            x = rng.standard_normal((2, 1, 8, 8)).astype(np.float32)
            t = np.full(2, bundle.deployment.timesteps[1], np.int64)
            given: dict[str, Any] = {signature.sample: x, signature.timestep: t}
            np.savez(made[name].with_suffix(".npz"), **given)
    return made


def build_and_run(models: dict[str, Path], folder: Path, first: list[Path]) -> str:
    """Run code in a fresh process that searches these folders first; return the version of its onnxruntime."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*first, ROOT]))}
    command = [sys.executable, "-c", PROGRAM, str(folder), *map(str, models.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def newest(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newest")
    assert build_and_run(models, folder, []) == running_version()
    return folder


@pytest.fixture(scope="module")
def oldest(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert OLDEST_FOLDER.is_dir(), f"onnxruntime {OLDEST} is not in {OLDEST_FOLDER}; run: make venv"
    folder = tmp_path_factory.mktemp("oldest")
    assert build_and_run(models, folder, [OLDEST_FOLDER]) == OLDEST, "another version was found there; run: make venv"
    return folder


def kernels(built: Path) -> tuple[int, int]:
    """Integer and float kernels of a graph that onnxruntime wrote."""
    found = Counter(node.op_type for node in onnx.load(built, load_external_data=False).graph.node)
    return sum(found[op] for op in INTEGER_KERNELS), sum(found[op] for op in FLOAT_KERNELS)


@pytest.mark.parametrize("version", ["oldest", "newest"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("model", INTEGER)
def test_all_layers_but_the_islands_are_integer_kernels(
    request: pytest.FixtureRequest, model: str, spelling: str, version: str
) -> None:
    built: Path = request.getfixturevalue(version)
    assert kernels(built / f"{model}-{spelling}.onnx") == (INTEGER[model], ISLANDS)


def check_same(want: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> None:
    """Within one step of an 8-bit grid over the output.

    Kernels of two versions may round a sum to either side of an edge, which is one step where it happens; but a bias
    that is left out, or a scale that is read wrongly, moves the whole picture by many.
    """
    step = float(np.ptp(want)) / 255
    np.testing.assert_allclose(got, want, rtol=0, atol=step)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("model", INTEGER)
def test_both_versions_compute_the_same(oldest: Path, newest: Path, model: str, spelling: str) -> None:
    want, got = (np.load(folder / f"{model}-{spelling}.npy") for folder in (newest, oldest))
    check_same(want, got)
    with pytest.raises(AssertionError):
        check_same(want, got * np.float32(1.01))


def test_the_oldest_version_is_written_in_one_place() -> None:
    """pyproject.toml names its minor version, the runtime lists it as tested, the tool installs it."""
    bound = re.search(r'"onnxruntime>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert bound is not None
    lower, upper = (tuple(map(int, v.split("."))) for v in bound.groups())
    tested = sorted(tuple(map(int, v.split("."))) for v in TESTED_ONNXRUNTIME)
    oldest = tuple(map(int, OLDEST.split(".")))
    assert oldest == max(v for v in tested if v[:2] == lower)
    assert (tested[-1][0], tested[-1][1] + 1) == upper
