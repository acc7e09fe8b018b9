"""`mezzotint audit`: totals, reasons, JSON, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from mezzotint.compiler.audit.kernels import audit_kernels
from mezzotint.compiler.graph.ops import Layer
from mezzotint.runtime.bundle.manifest_entries import LayerKernel
from mezzotint.runtime.session import running_version
from tests.helpers.groups import CONV, W, X, Y, write_groups
from tests.helpers.models import Cli, Compiled

FAULT = X + W + CONV + Y + "y2 = Exp (c)"
SECOND = ", float[1,4,8,8] y2"


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    return write_groups(tmp_path, FAULT, outputs=SECOND)


def test_a_bundle(cli: Cli, hand: Compiled) -> None:
    answer = cli("audit", hand.bundle.path, "--strict", "--threads", 1)
    assert answer.code == 0, answer.err
    assert "island" in answer.out and "second" not in answer.out
    assert "second" in cli("audit", hand.bundle.path, "--all").out


def test_a_bundle_as_json(cli: Cli, hand: Compiled) -> None:
    printed = json.loads(cli("audit", hand.bundle.path, "--json").out)
    assert printed["ok"] is True
    (fusion,) = printed["files"].values()
    assert fusion["onnxruntime"] == running_version()
    assert {name: n for name, n in fusion["totals"].items() if n} == {"integer": 2, "islands": 2}
    assert fusion["rules"] == {} and fusion["strays"] == []
    kernels = hand.bundle.manifest.kernels
    assert fusion["layers"] == {"integer": kernels.integer, "float": kernels.floating} == {"integer": 2, "float": 2}
    assert "2 integer, 2 float" in cli("audit", hand.bundle.path).out
    first = next(v for v in fusion["verdicts"] if v["name"] == "first")
    assert (first["op"], first["kernel"], first["integer"], first["rule"]) == ("Conv", "Conv", False, "island")
    assert first["why"] == hand.bundle.manifest.islands["first"]


def test_a_file_that_fails(cli: Cli, faulty: Path) -> None:
    answer = cli("audit", faulty)
    assert answer.code == 0
    assert "float-reader" in answer.out and "What helps: let 'y2' read" in answer.out.replace("\n", " ")
    assert cli("audit", faulty, "--strict").code == 1
    printed = cli("audit", faulty, "--strict", "--json")
    assert printed.code == 1
    data = json.loads(printed.out)
    assert data["ok"] is False
    assert data["files"]["groups.onnx"]["rules"] == {"float-reader": 1}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.onnx", "does not exist"),
        ("notes.txt", "neither a bundle"),
        ("text.onnx", "not an ONNX model"),
        (".", "no mezzotint.json"),
    ],
)
def test_refusals(cli: Cli, tmp_path: Path, name: str, words: str) -> None:
    for file in ("notes.txt", "text.onnx"):
        (tmp_path / file).write_text("words")
    answer = cli("audit", tmp_path / name)
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err, answer.err


def test_openvino(cli: Cli, hand: Compiled, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="the extra mezzotint[openvino] is not installed")
    answer = cli("audit", hand.bundle.path, "--provider", "openvino", "--strict", "--threads", 1)
    assert answer.code == 0, answer.err
    version = openvino.get_version().partition("-")[0]
    assert "2 integer, 2 float" in answer.out and "island" in answer.out and version in answer.out
    faulty = write_groups(tmp_path, W + CONV.replace("(d,", "(x,").replace(" c =", " y ="))
    printed = cli("audit", faulty, "--provider", "openvino", "--json", "--strict")
    data = json.loads(printed.out)
    assert (printed.code, data["ok"], data["provider"]) == (1, False, "openvino")
    assert data["files"]["groups.onnx"]["openvino"] == version
    assert data["files"]["groups.onnx"]["rules"] == {"weight-only": 1}


def test_openvino_that_is_not_installed(cli: Cli, hand: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    answer = cli("audit", hand.bundle.path, "--provider", "openvino")
    assert (answer.code, answer.out) == (2, "")
    assert "pip install 'mezzotint[openvino]'" in answer.err


def test_tensorrt(cli: Cli, hand: Compiled, tmp_path: Path) -> None:
    """The bundle of onnxruntime's form is not legal, and every violation is printed with its fix."""
    answer = cli("audit", hand.bundle.path, "--provider", "tensorrt", "--strict")
    assert answer.code == 1
    assert "nothing was run" in answer.out and "quantized-type" in answer.out and "zero-point" in answer.out
    every = cli("audit", hand.bundle.path, "--provider", "tensorrt", "--all")
    data = json.loads(cli("audit", hand.bundle.path, "--provider", "tensorrt", "--json").out)
    (listed,) = data["files"].values()
    assert every.out.count("What helps") == len(listed["violations"]) > answer.out.count("What helps") > 1
    assert sum(listed["rules"].values()) == len(listed["violations"])
    legal = write_groups(tmp_path, X.replace("z)", "z8)") + W + CONV.replace(" c =", " y ="))
    printed = cli("audit", legal, "--provider", "nv_tensorrt_rtx", "--strict", "--json")
    data = json.loads(printed.out)
    assert (printed.code, data["ok"], data["provider"]) == (0, True, "nv_tensorrt_rtx")
    assert data["files"]["groups.onnx"]["run"] is False


def test_an_unknown_provider(cli: Cli, hand: Compiled) -> None:
    answer = cli("audit", hand.bundle.path, "--provider", "abacus")
    assert (answer.code, answer.out) == (2, "")
    assert "'abacus'" in answer.err and "openvino" in answer.err


def test_the_manifest_says_why(faulty: Path, tmp_path: Path) -> None:
    """A layer that onnxruntime left in float has the rule's reason and fix; an island its own reason."""
    known = audit_kernels(faulty, [], tmp_path, threads=1)
    node = next(node for node in ir.load(faulty).graph if node.op_type == "Conv")
    layer = Layer(node, "conv", (), None, None, None, None, node.outputs[0])
    found = audit_kernels(faulty, [layer], tmp_path, threads=1)
    row = found.entry({}).layers["node"]
    assert (row.kernel, row.integer) == ("Conv", False)
    verdict = known.fusion.failed[0]
    assert row.why == f"{verdict.why} ({verdict.fix})"
    assert found.entry({"node": "told so"}).layers["node"].why == "told so"
    gone = audit_kernels(write_groups(tmp_path, "y = Exp (x)"), [layer], tmp_path, threads=1).entry({}).layers["node"]
    assert gone == LayerKernel("unknown", False, "the file has no such node any more")
