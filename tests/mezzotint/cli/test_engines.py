"""--provider, --provider-option and --precision of the commands, on OpenVINO."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mezzotint import compile_model
from mezzotint.bench.trace import INTEGER_GROUP
from mezzotint.evaluate.memory import memory_of_one_call
from mezzotint.runtime.compare import psnr_db
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.providers.names import find_engine
from tests.helpers.models import SMALL, Cli, Compiled

pytest.importorskip("openvino")

OPENVINO = ["--provider", "openvino", "--threads", "1"]


def test_sample_says_what_was_used(hand: Compiled, cli: Cli, tmp_path: Path) -> None:
    words = ["sample", hand.bundle.path, "-n", 3, "--seed", 1]
    found = {}
    for name, options in {
        "cpu": ["--threads", "1"],
        "f32": [*OPENVINO, "--provider-option", "PERFORMANCE_HINT=THROUGHPUT"],
    }.items():
        answer = cli(*words, "-o", tmp_path / f"{name}.npy", *options, "--json")
        assert answer.code == 0, answer.err
        found[name] = json.loads(answer.out)["engine"]
    assert (found["cpu"]["engine"], found["f32"]["engine"]) == ("cpu", "openvino")
    assert (found["f32"]["precision"], found["f32"]["threads"]) == ("f32", 1)
    assert "THROUGHPUT" in found["f32"]["options"]["PERFORMANCE_HINT"]
    one, two = (np.clip(np.load(tmp_path / f"{name}.npy"), -1, 1) for name in found)
    assert 30 < psnr_db(one, two, peak=2.0).min() < np.inf


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--provider", "openvin"], "no engine is called 'openvin'"),
        (["--provider", "cuda"], "pip install onnxruntime-gpu"),
        (["--precision", "bf16"], "cpu cannot compute in bf16"),
        ([*OPENVINO, "--precision", "int8"], "no precision is called 'int8'"),
        ([*OPENVINO, "--provider-option", "A"], "the form is KEY=VALUE"),
        ([*OPENVINO, "--provider-option", "A=1", "--provider-option", "A=2"], "A is given twice"),
        ([*OPENVINO, "--provider-option", "NO_SUCH=1"], "NO_SUCH"),
    ],
)
def test_wrong_engines_are_one_error(hand: Compiled, cli: Cli, tmp_path: Path, options: list[str], said: str) -> None:
    answer = cli("sample", hand.bundle.path, "-o", tmp_path / "x.npy", "-n", 1, *options)
    assert answer.code == 2 and said in answer.err, answer.err
    assert "Traceback" not in answer.err and not (tmp_path / "x.npy").exists()


def test_the_integer_form_names_the_fix(hand: Compiled, cli: Cli, tmp_path: Path) -> None:
    settings = {"insert_qdq.islands": ["first", "last"]}  # the recipe's own leave no layer of this network
    bundle = compile_model(hand.exported, tmp_path / "steps", recipe="w8a8-steps", settings=settings, **SMALL)
    answer = cli("sample", bundle.path, "-o", tmp_path / "x.npy", "-n", 1, *OPENVINO)
    assert answer.code == 2 and "--target openvino" in answer.err, answer.err


def test_shards_belong_to_one_engine(hand: Compiled, cli: Cli, tmp_path: Path) -> None:
    words = ["sample", hand.bundle.path, "-o", tmp_path / "folder", "-n", 2, "--shard-size", 1]
    assert cli(*words, "--shards", "0", *OPENVINO).code == 0
    other = cli(*words)
    assert other.code == 2 and "provider was 'openvino'" in other.err and "give --provider" in other.err, other.err
    again = cli(*words, *OPENVINO, "--json")
    assert json.loads(again.out)["made"] == [1], again.err


def test_bench_times_the_nodes_of_openvino(hand: Compiled, cli: Cli) -> None:
    words = ["bench", hand.bundle.path, "--float", hand.exported, "--repeats", 2, "--rounds", 1, *OPENVINO]
    answer = cli(*words, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["engine"]["engine"] == "openvino" and found["speedup"] > 0
    groups = {group["group"]: group["nodes"] for group in found["groups"]}
    assert groups[INTEGER_GROUP] >= 2 and groups["float kernels"] >= 2  # two convolutions, and the two islands
    assert "Convolution" in {operation["op"] for operation in found["operations"]}


def test_the_memory_of_a_call_is_that_of_the_engine(hand: Compiled) -> None:
    with pytest.raises(InputError, match="devices here: CPU"):
        wrong = find_engine("openvino", {"NO_SUCH": "1"})
        memory_of_one_call(hand.bundle, [hand.bundle.model_path], 1, threads=1, engine=wrong)


def test_eval_and_debug_measure_the_engine(hand: Compiled, cli: Cli, tmp_path: Path) -> None:
    words = ["eval", hand.bundle.path, "--reference", hand.exported, "-n", 2, "-o", tmp_path / "e", "--no-speed"]
    words += ["--features", "none", "--resamples", 2]
    answer = cli(*words, *OPENVINO, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["engine"]["engine"] == "openvino"
    assert "openvino (openvino 20" in (tmp_path / "e" / "eval.md").read_text(encoding="utf-8")
    assert "provider was 'openvino'" in cli(*words).err
    debug = cli("debug", hand.bundle.path, "--reference", hand.exported, "--calls", 1, *OPENVINO, "--json")
    assert json.loads(debug.out)["engine"]["engine"] == "openvino", debug.err
