"""The audit of OpenVINO: what it counts is what OpenVINO compiled, and planted failures get the right rule."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mezzotint.compiler.audit.fusion import UNKNOWN, Verdict, load_graph
from mezzotint.compiler.audit.openvino import audit_openvino, judge_compiled
from mezzotint.compiler.audit.openvino_built import CompiledGraph, CompiledLayer, compiled_graph
from mezzotint.compiler.audit.openvino_rules import OPENVINO_RULES
from mezzotint.compiler.errors import ModelError
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.session import open_session
from tests.helpers import groups
from tests.helpers.groups import CONV, IMAGE, LATE, TOKENS, X2, M, W, X, Y, write_groups
from tests.helpers.models import Compiled

openvino = pytest.importorskip("openvino", reason="the extra mezzotint[openvino] is not installed")

MORE: Mapping[str, npt.NDArray[Any]] = {
    "wc": np.concatenate([groups.CONSTANTS["w"]] * 2, axis=1),
    "wz5": np.array([1, 2, 3, 4], np.int8),
    "m4": (groups.CONSTANTS["m"] // 20).astype(ml_dtypes.int4),
    "m_odd": np.array([0.01, 0.02, 0.005, 0.03], np.float32),
    "z_0": np.array(0, np.uint8),
    "z_126": np.array(126, np.uint8),
    "low": np.array(-2, np.float32),
    "high": np.array(3, np.float32),
    "lows": np.array([-1, -2, -3], np.float32),
}
CONV_Y = CONV.replace(" c =", " y =")
WIDE_Y = "we = DequantizeLinear <axis = 0> (wc, ws, wz) " + CONV_Y.replace("wd", "we")
LINEAR_Y = "[node] y = MatMul (d, md) "
ON_E = ("(d,", "(e,")
TURNED = (TOKENS[0], "float[1,3,2,4] y")
SCORES = (TOKENS[0], "float[1,2,3,3] y")


def product(first: str, second: str) -> str:
    """x times itself, transposed, with these zero points."""
    return (
        f"q = QuantizeLinear (x, s, {first}) d = DequantizeLinear (q, s, {first}) "
        f"q2 = QuantizeLinear (x, s2, {second}) d2 = DequantizeLinear (q2, s2, {second}) "
        "turned = Transpose <perm = [0,1,3,2]> (d2) [node] y = MatMul (d, turned)"
    )


def fake(low: str) -> str:
    return f"d = org.openvinotoolkit.FakeQuantize <levels = 256> (x, {low}, high, {low}, high) "


@dataclass(frozen=True)
class Fault:
    """A model that stays in float by one rule, words of the reason, and its twin that runs on integers."""

    rule: str
    words: tuple[str, ...]
    fault: str
    fixed: str
    kind: tuple[str, str] = IMAGE


FAULTS = {
    "a scale for each channel": Fault(
        "per-channel-activation",
        ("'steps'",),
        "q = QuantizeLinear <axis = 1> (x, steps, zs) d = DequantizeLinear <axis = 1> (q, steps, zs) " + W + CONV_Y,
        X + W + CONV_Y,
    ),
    "parts of two scales": Fault(
        "unlike-parts",
        ("'e'", "'s' and 's2'"),
        X + X2 + "e = Concat <axis = 1> (d, d2) " + WIDE_Y.replace(*ON_E),
        "part = Concat <axis = 1> (x, x) " + X.replace("(x,", "(part,") + WIDE_Y,
    ),
    "a mover between the quantizers": Fault(
        "mover-between",
        ("Transpose ('turned')",),
        "q = QuantizeLinear (x, s, z) turned = Transpose <perm = [0,2,1,3]> (q) d = DequantizeLinear (turned, s, z) "
        + M
        + LINEAR_Y,
        X + "e = Transpose <perm = [0,2,1,3]> (d) " + M + LINEAR_Y.replace(*ON_E),
        TURNED,
    ),
    "a gathered scale": Fault(
        "run-time-scale",
        ("'r'",),
        LATE + W + CONV_Y,
        "r = Gather (table, t) e = Mul (x, r) " + X.replace("(x,", "(e,") + W + CONV + "y = Mul (c, r)",
    ),
    "a gathered zero point": Fault(
        "run-time-scale",
        ("'rz'",),
        "rz = Gather (ztable, t) q = QuantizeLinear (x, s, rz) d = DequantizeLinear (q, s, rz) " + W + CONV_Y,
        X + W + CONV_Y,
    ),
    "an operation on integers": Fault(
        "integer-operation",
        ("QLinearConv", "in float"),
        X
        + "[node] qy = QLinearConv <pads = [1,1,1,1]> (q, s, z, w, ws, wz, s2, z, b) y = DequantizeLinear (qy, s2, z)",
        X + W + CONV_Y,
    ),
    "a transposed convolution": Fault(
        "transposed-conv",
        ("transposed",),
        X + "wd = DequantizeLinear <axis = 1> (w, ws, wz) [node] y = ConvTranspose <pads = [1,1,1,1]> (d, wd)",
        X + W + CONV_Y,
    ),
    "a gathered range": Fault(
        "run-time-range",
        ("'low_t'",),
        "low_t = Gather (lows, t) " + fake("low_t") + W + CONV_Y,
        fake("low") + W + CONV_Y,
    ),
    "weight only": Fault("weight-only", ("'x' in float",), W + CONV_Y.replace("(d,", "(x,"), X + W + CONV_Y),
    "one factor of two": Fault(
        "float-input",
        ("input 'turned'",),
        X + "turned = Transpose <perm = [0,1,3,2]> (x) [node] y = MatMul (d, turned)",
        product("z8", "z8"),
        SCORES,
    ),
    "an activation in between": Fault(
        "weight-only",
        ("'e' in float",),
        X + W + "e = Relu (d) " + CONV_Y.replace(*ON_E),
        "e = Relu (x) " + X.replace("(x,", "(e,") + W + CONV_Y,
    ),
    "16 bits": Fault(
        "sixteen-bit",
        ("UINT16",),
        "q = QuantizeLinear (x, s, z16) d = DequantizeLinear (q, s, z16) " + W + CONV_Y,
        X + W + CONV_Y,
    ),
    "a 4-bit weight": Fault(
        "narrow-weight",
        ("'m4' has 4 bits",),
        X + "md = DequantizeLinear <axis = 1> (m4, ws, w4z) " + LINEAR_Y,
        X + "m8 = Cast <to = 3> (m4) md = DequantizeLinear <axis = 1> (m8, ws, wz) " + LINEAR_Y,
        TOKENS,
    ),
    "a weight around another point": Fault(
        "weight-zero-point", ("'wz5'",), X + W.replace("wz", "wz5") + CONV_Y, X + W + CONV_Y
    ),
    "scales along the inputs": Fault(
        "weight-axis",
        ("axis 0",),
        X + M.replace("axis = 1", "axis = 0").replace("ws", "m_odd") + LINEAR_Y,
        X + M.replace("ws", "m_odd") + LINEAR_Y,
        TOKENS,
    ),
    "a product of shifted activations": Fault(
        "shifted-product", ("first is UINT8", "128"), product("z", "z8"), product("z8", "z"), SCORES
    ),
    "a product with a shifted second factor": Fault(
        "shifted-product", ("second is UINT8", "126"), product("z_0", "z_126"), product("z_0", "z8"), SCORES
    ),
}


def audited(folder: Path, nodes: str, kind: tuple[str, str]) -> Verdict:
    """The verdict on the layer called `node`."""
    found = audit_openvino(write_groups(folder, nodes, kind), threads=1).of("node")
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def more_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "CONSTANTS", {**groups.CONSTANTS, **MORE})


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_failure_is_named_and_its_twin_runs_on_integers(tmp_path: Path, name: str) -> None:
    case = FAULTS[name]
    failed = audited(tmp_path, case.fault, case.kind)
    assert (failed.rule, failed.integer, failed.failed) == (case.rule, False, True), failed
    assert all(word in failed.why for word in case.words), failed.why
    assert failed.fix and failed.kernel
    fixed = audited(tmp_path, case.fixed, case.kind)
    assert (fixed.rule, fixed.integer) == ("", True), fixed


def test_every_rule_has_a_planted_failure() -> None:
    assert {case.rule for case in FAULTS.values()} == {rule.id for rule in OPENVINO_RULES}


def test_the_counts_are_those_of_the_compiled_graph(hand: Compiled, tmp_path: Path) -> None:
    """Counted a second time, from the types of all layers; a layer that is flipped shows."""
    model, islands = hand.bundle.model_path, hand.bundle.manifest.islands
    compiled = compiled_graph(model, threads=1)
    layers = [layer for layer in compiled.layers if layer.layer in ("Convolution", "FullyConnected", "MatMul")]
    integer = sum(layer.inputs[0] in ("u8", "i8") for layer in layers)
    found = judge_compiled(load_graph(model), compiled, islands)
    assert (found.layers.integer, found.layers.floating) == (integer, len(layers) - integer) == (2, 2)
    assert {v.name for v in found.verdicts if v.rule == "island"} == set(islands)
    assert (found.strays, found.failed, found.engine, found.version) == (
        (),
        (),
        "openvino",
        openvino.get_version().partition("-")[0],
    )
    (first, *_) = [layer for layer in layers if layer.integer]
    flipped = tuple(replace(v, inputs=("f32", "f32")) if v is first else v for v in compiled.layers)
    wrong = judge_compiled(load_graph(model), CompiledGraph(flipped, compiled.version), islands)
    assert wrong.layers.integer == integer - 1
    assert [v.rule for v in wrong.failed] == [UNKNOWN]
    assert "no rule explains" in wrong.failed[0].why


def test_a_layer_that_no_node_explains_is_counted_as_a_stray(hand: Compiled) -> None:
    graph = load_graph(hand.bundle.model_path)
    stray = CompiledLayer("MatMul", "brgemm_avx512_I8", ("u8", "i8"), ("invented",))
    found = judge_compiled(graph, CompiledGraph((stray,), "1"), {})
    assert (found.strays, found.layers) == (("MatMul invented",), (1, 0))
    assert {v.rule for v in found.verdicts} == {"gone"}


@pytest.mark.parametrize(("zero", "integer"), [("z8", True), ("half", False)])
def test_products_within_one_kernel_of_attention(tmp_path: Path, zero: str, integer: bool) -> None:
    """OpenVINO runs both products and the softmax in one Subgraph, which shows the types of its own inputs only."""

    def quantized(name: str, value: str, scale: str = "s") -> str:
        return f"{name}q = QuantizeLinear ({value}, {scale}, z8) {name} = DequantizeLinear ({name}q, {scale}, z8) "

    v = quantized("v", "x") if integer else "v = Exp (x) "
    nodes = (
        quantized("a", "x")
        + "turned = Transpose <perm = [0,1,3,2]> (x) "
        + (quantized("b", "turned") if integer else "b = Exp (turned) ")
        + "[first] m = MatMul (a, b) p = Softmax <axis = -1> (m) "
        + quantized("pd", "p", "s2")
        + v
        + "[node] y = MatMul (pd, v)"
    )
    found = audit_openvino(write_groups(tmp_path, nodes, TOKENS), threads=1)
    assert [(v.integer, v.rule) for v in found.verdicts] == [(integer, "" if integer else "float-input")] * 2
    assert {v.kernel.split()[0] for v in found.verdicts} == {"Subgraph"}


def test_qlinearconv_is_computed_wrong(tmp_path: Path) -> None:
    """The reason of the rule, measured: OpenVINO's numbers are those of scales along the weight's input channels."""
    nodes = FAULTS["an operation on integers"].fault.replace("ws", "m_odd").replace(", b)", ")")
    model = write_groups(tmp_path, nodes)
    (verdict,) = audit_openvino(model, threads=1).failed
    assert "wrong" in verdict.why and "input channels" in verdict.why
    x = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    compiled = openvino.Core().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    computed = compiled({"x": x})[0]
    feeds = {"x": x, "t": np.array(0)}
    right = open_session(model, threads=1, level="none").run(None, feeds)[0]
    along_inputs = X + W.replace("ws", "m_odd").replace("axis = 0", "axis = 1") + CONV + Y
    wrong = open_session(write_groups(tmp_path, along_inputs), threads=1, level="none").run(None, feeds)[0]
    assert np.abs(computed - wrong).max() <= groups.CONSTANTS["s2"]  # one step of the output's grid
    assert np.abs(computed - right).max() > 0.5 * np.abs(right).max()


def test_a_file_that_openvino_refuses(tmp_path: Path) -> None:
    product = "[node] n = QLinearMatMul (q, s, z, m, ws, wz, s2, z) "
    nodes = "q = QuantizeLinear (x, s, z) " + product + "y = DequantizeLinear (n, s2, z)"
    with pytest.raises(InputError) as refused:
        audit_openvino(write_groups(tmp_path, nodes, TOKENS))
    assert "OpenVINO cannot load the model" in refused.value.what
    assert refused.value.hint is not None and "QLinearMatMul" in refused.value.hint
    with pytest.raises(ModelError, match="no such file"):
        audit_openvino(tmp_path / "gone.onnx")


def test_layers_are_found_without_names_and_not_with_one_for_all(tmp_path: Path) -> None:
    two = X + W + CONV + "[other] y = Conv <pads = [1,1,1,1]> (c, wd)"
    for name, counts in (("", (1, 1)), ("node", None)):
        model = write_groups(tmp_path, two.replace("[node] ", "").replace("[other] ", f"[{name}] " if name else ""))
        named = ir.load(model)
        for node in named.graph:
            node.name = name or None
        ir.save(named, model)
        if counts is None:
            with pytest.raises(ModelError, match="2 layers are called 'node'"):
                audit_openvino(model, threads=1)
        else:
            found = audit_openvino(model, threads=1)
            assert (found.layers, found.strays, [v.name for v in found.verdicts]) == (counts, (), ["c", "y"])


def test_a_missing_openvino_is_one_error(hand: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError) as missing:
        audit_openvino(hand.bundle.model_path)
    assert "pip install 'mezzotint[openvino]'" in str(missing.value.hint)
