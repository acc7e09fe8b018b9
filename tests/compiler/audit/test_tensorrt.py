"""TensorRT's rules: one planted violation for each, and its legal twin. Nothing here runs TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mezzotint.compiler.audit.tensorrt import Legality, check_graph, check_tensorrt
from mezzotint.compiler.errors import ModelError
from tests.helpers import groups
from tests.helpers.groups import CONV, IMAGE, TOKENS, M, W, group_model, write_groups

MORE: Mapping[str, npt.NDArray[Any]] = {
    "zero_scale": np.array(0, np.float32),
    "none": np.zeros(2, np.int8),
    "b32s": np.full(4, 0.0002, np.float32),
    "m4": (groups.CONSTANTS["m"] // 20).astype(ml_dtypes.int4),
    "m4_odd": (groups.CONSTANTS["m"][:, :3] // 20).astype(ml_dtypes.int4),
    "m_odd": groups.CONSTANTS["m"][:, :3],
    "ws3": np.full(3, 0.01, np.float32),
    "one_block": np.full((2, 4), 0.01, np.float32),
    "two_blocks": np.full((2, 2), 0.01, np.float32),
}
X = "q = QuantizeLinear (x, s, z8) d = DequantizeLinear (q, s, z8) "
X2 = "q2 = QuantizeLinear (x, s2, z8) d2 = DequantizeLinear (q2, s2, z8) "
CONV_Y = CONV.replace(" c =", " y =")
LINEAR_Y = "[node] y = MatMul (d, md) "
LEGAL = X + W + CONV_Y
SUM = "e = Add (c, {}) qe = QuantizeLinear (e, s2, z8) y = DequantizeLinear (qe, s2, z8)"
RESIDUAL = X + W + CONV + SUM


@dataclass(frozen=True)
class Broken:
    """A model that breaks one rule, words of the reason, and its twin that breaks none."""

    rule: str
    words: tuple[str, ...]
    fault: str
    fixed: str = LEGAL
    kind: tuple[str, str] = IMAGE
    times: int = 1
    fixed_kind: tuple[str, str] | None = None


BROKEN = {
    "unsigned": Broken("quantized-type", ("UINT8",), LEGAL.replace("s, z8", "s, z_unsigned"), times=2),
    "no zero point": Broken(
        "quantized-type",
        ("without a zero point",),
        LEGAL.replace("(x, s, z8)", "(x, s)").replace("(q, s, z8)", "(q, s)"),
        times=2,
    ),
    "16 bits": Broken("quantized-type", ("UINT16",), LEGAL.replace("z8", "z16_zero"), times=2),
    "an integer bias": Broken(
        "integer-bias",
        ("'b' is INT32",),
        X + W + "bd = DequantizeLinear <axis = 0> (b, b32s) " + CONV_Y.replace("wd)", "wd, bd)"),
        X + W + CONV_Y.replace("wd)", "wd, bf)"),
    ),
    "a zero point": Broken("zero-point", ("'z17'",), LEGAL.replace("z8", "z17"), times=2),
    "two zero points": Broken(
        "zero-point-size", ("2 entries, its scale 1",), LEGAL.replace("(q, s, z8)", "(q, s, none)")
    ),
    "a gathered scale": Broken(
        "run-time-scale",
        ("'r'",),
        "r = Gather (table, t) " + LEGAL.replace("s, z8", "r, z8"),
        "r = Gather (table, t) e = Mul (x, r) " + LEGAL.replace("(x,", "(e,"),
        times=2,
    ),
    "a scale of 0": Broken("scale-sign", ("'zero_scale'",), LEGAL.replace("s, z8", "zero_scale, z8"), times=2),
    "scales of channels": Broken(
        "per-axis-activation",
        ("4 scales", "activation"),
        LEGAL.replace("QuantizeLinear (x, s, z8)", "QuantizeLinear <axis = 1> (x, ss, wz)").replace(
            "DequantizeLinear (q, s, z8)", "DequantizeLinear <axis = 1> (q, ss, wz)"
        ),
        times=2,
    ),
    "no axis": Broken("axis-default", ("axis 0, ONNX axis 1",), X + W.replace(" <axis = 0>", "") + CONV_Y),
    "scales of another size": Broken(
        "axis-size", ("4 scales along axis 2",), X + W.replace("axis = 0", "axis = 2") + CONV_Y
    ),
    "scales of the inputs": Broken("weight-axis", ("axis 1", "axis 0"), X + W.replace("axis = 0", "axis = 1") + CONV_Y),
    "a 4-bit activation": Broken("int4-activation", ("'x'", "weights only"), LEGAL.replace("z8", "z4"), times=2),
    "an odd 4-bit weight": Broken(
        "int4-odd",
        ("is 3",),
        X + "md = DequantizeLinear <axis = 1> (m4_odd, ws3) " + LINEAR_Y,
        X + "md = DequantizeLinear <axis = 1> (m4, ws) " + LINEAR_Y,
        (TOKENS[0], "float[1,2,3,3] y"),
        fixed_kind=TOKENS,
    ),
    "blocks of two dimensions": Broken(
        "blocks",
        ("2 blocked dimensions",),
        X + "md = DequantizeLinear <axis = 0, block_size = 2> (m4, two_blocks) " + LINEAR_Y,
        X + "md = DequantizeLinear <axis = 0, block_size = 2> (m4, one_block) " + LINEAR_Y,
        TOKENS,
    ),
    "another domain": Broken(
        "foreign-operation",
        ("com.microsoft.MatMulIntegerToFloat",),
        "q = QuantizeLinear (x, s, z8) [node] y = com.microsoft.MatMulIntegerToFloat (q, m, s, ws, z8, wz, bf)",
        X + M + LINEAR_Y,
        TOKENS,
    ),
    "an operation that is not read": Broken(
        "unread-operation",
        ("QLinearConv",),
        "q = QuantizeLinear (x, s, z8) [node] n = QLinearConv <pads = [1,1,1,1]> (q, s, z8, w, ws, wz, s2, z8) "
        "y = DequantizeLinear (n, s2, z8)",
    ),
    "a mover between the quantizers": Broken(
        "integer-operation",
        ("'q'",),
        "q = QuantizeLinear (x, s, z8) [node] e = Transpose <perm = [0,1,3,2]> (q) y = DequantizeLinear (e, s, z8)",
        X + "[node] y = Transpose <perm = [0,1,3,2]> (d)",
    ),
    "a 4-bit weight that is cast": Broken(
        "integer-operation",
        ("'m4'",),
        X + "[node] m8 = Cast <to = 3> (m4) md = DequantizeLinear <axis = 1> (m8, ws, wz) y = MatMul (d, md)",
        X + "md = DequantizeLinear <axis = 1> (m4, ws) " + LINEAR_Y,
        TOKENS,
    ),
    "a quantizer within a fused sum": Broken(
        "quantized-branch",
        ("'node'",),
        X + W + CONV + "qc = QuantizeLinear (c, s2, z8) dc = DequantizeLinear (qc, s2, z8) y = Add (dc, x)",
        X + W + CONV + "y = Add (c, x)",
    ),
    "a float shortcut of a quantized sum": Broken(
        "float-residual", ("'x' is float",), RESIDUAL.format("x"), RESIDUAL.format("d")
    ),
    "parts of two scales": Broken(
        "concat-scales",
        ("2 scales",),
        X + X2 + "y = Concat <axis = 1> (d, d2)",
        X + "y = Concat <axis = 1> (d, d)",
        (IMAGE[0], "float[1,8,8,8] y"),
    ),
}


@pytest.fixture(autouse=True)
def more_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {
        **MORE,
        "z_unsigned": np.array(0, np.uint8),
        "z16_zero": np.array(0, np.uint16),
        "z17": np.array(17, np.int8),
        "z4": np.array(0, ml_dtypes.int4),
    }
    monkeypatch.setattr(groups, "CONSTANTS", {**groups.CONSTANTS, **extra})


def checked(nodes: str, kind: tuple[str, str]) -> Legality:
    return check_graph(reread(nodes, kind).graph)


def reread(nodes: str, kind: tuple[str, str] = IMAGE) -> ir.Model:
    """The model as it is read from a file: its constants have types."""
    return ir.from_proto(ir.to_proto(group_model(nodes, kind)))


@pytest.mark.parametrize("name", BROKEN)
def test_a_planted_violation_is_named_and_its_twin_is_legal(name: str) -> None:
    case = BROKEN[name]
    found = checked(case.fault, case.kind).violations
    assert [v.rule for v in found if v.rule == case.rule] == [case.rule] * case.times, found
    violation = next(v for v in found if v.rule == case.rule)
    assert all(word in violation.why for word in case.words), violation
    assert violation.fix and violation.name
    assert violation.kind == ("placement" if violation.rule in PLACEMENT else "illegal")
    assert checked(case.fixed, case.fixed_kind or case.kind).violations == ()


PLACEMENT = {"quantized-branch", "float-residual", "concat-scales"}


def test_a_sum_that_is_also_read_in_float_may_have_a_float_shortcut() -> None:
    assert checked(RESIDUAL.format("x").replace("y =", "dy =") + " y = Add (dy, e)", IMAGE).violations == ()


def test_the_opset_that_the_importer_reads() -> None:
    model = reread(LEGAL)
    for version, rules in ((8, ["opset"]), (21, []), (26, ["opset"])):
        model.graph.opset_imports[""] = version
        assert [v.rule for v in check_graph(model.graph).violations] == rules


def test_counts_and_json(tmp_path: Path) -> None:
    found = check_tensorrt(
        write_groups(tmp_path, LEGAL + " [other] y2 = Conv <pads = [1,1,1,1]> (x, wf)", outputs=", float[1,4,8,8] y2")
    )
    assert (found.layers, found.quantizers, found.failed) == ((1, 1), 3, ())
    data = found.to_json()
    assert (data["run"], data["legal"], data["layers"]) == (False, True, {"quantized": 1, "float": 1})
    broken = check_tensorrt(write_groups(tmp_path, LEGAL.replace("z8", "z17")), "nv_tensorrt_rtx")
    assert broken.to_json()["rules"] == {"zero-point": 2}
    assert (broken.engine, broken.to_json()["legal"]) == ("nv_tensorrt_rtx", False)
    with pytest.raises(ModelError, match="no such file"):
        check_tensorrt(tmp_path / "gone.onnx")


def test_violations_come_in_the_order_of_the_file() -> None:
    graph = reread(LEGAL.replace("z8", "z17")).graph
    names = [v.name for v in check_graph(graph).violations]
    assert names == ["q", "d"]
    assert [node.op_type for node in graph][:2] == ["QuantizeLinear", "DequantizeLinear"]
    assert isinstance(graph, ir.Graph)
