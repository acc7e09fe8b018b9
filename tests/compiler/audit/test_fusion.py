"""The fusion audit: it agrees with the built graph node for node, and names the right rule for planted failures."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mezzotint import compile_model
from mezzotint.bench.peers import Call, prepare_peer
from mezzotint.compiler.audit.fusion import Fusion, Verdict, audit_fusion
from mezzotint.compiler.audit.rules import RULES
from mezzotint.compiler.errors import ModelError, OutputError
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.session import Level, open_session
from tests.helpers.groups import (
    BIAS,
    CONV,
    CONV_BIAS,
    IMAGE,
    LATE,
    ROWS,
    SAME,
    TOKENS,
    X2,
    M,
    W,
    X,
    Y,
    write_groups,
)
from tests.helpers.models import SMALL, Compiled, prompts

# Spelled out a second time, so that a mistake in the compiler's own sets shows.
FLOATS = {"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits"}
PRODUCTS = {"MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul", "QGemm", "ConvInteger"}

QUICK: dict[str, Any] = {**SMALL, "steps": 2, "calibration_samples": 1, "threads": 1}


def built_kernels(model: Path, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return (integer, float) kernels of the graph that onnxruntime builds: the output and operation of each."""
    file = folder / "optimized.onnx"
    open_session(model, threads=1, optimized=file)
    nodes = onnx.load(file, load_external_data=False).graph.node
    integer = {n.output[0]: n.op_type for n in nodes if n.op_type.startswith("QLinear") or n.op_type in PRODUCTS}
    return integer, {n.output[0]: n.op_type for n in nodes if n.op_type in FLOATS}


def disagreements(verdicts: Iterable[Verdict], kernels: tuple[dict[str, str], dict[str, str]]) -> set[tuple[str, str]]:
    """Return kernels of the built graph without exactly one verdict of their kind, and verdicts without a kernel."""
    told = list(verdicts)
    ours = (
        Counter((v.built, v.kernel) for v in told if v.integer and v.kernel in {*kernels[0].values(), *PRODUCTS}),
        Counter((v.built, v.kernel) for v in told if not v.integer and v.kernel in FLOATS),
    )
    odd: set[tuple[str, str]] = set()
    for mine, theirs in zip(ours, (Counter(k.items()) for k in kernels), strict=True):
        odd |= set(mine - theirs) | set(theirs - mine)
    return odd


def check_that_faults_show(fusion: Fusion, kernels: tuple[dict[str, str], dict[str, str]]) -> None:
    """Each verdict on a kernel that is flipped, left out or repeated is a disagreement."""
    told = list(fusion.verdicts)
    counted = {*kernels[0].values(), *FLOATS}
    for i, verdict in [(i, v) for i, v in enumerate(told) if v.kernel in counted]:
        for wrong in ([replace(verdict, integer=not verdict.integer)], [], [verdict, verdict]):
            assert disagreements([*told[:i], *wrong, *told[i + 1 :]], kernels), verdict


def audited(model: Path, folder: Path, islands: Mapping[str, str] | None = None) -> Fusion:
    return audit_fusion(model, folder, threads=1, islands=islands)


def remove_quantizer_behind(model: Path, operation: str) -> str:
    """Make the readers of the first such node's output read it in float, and return its name."""
    read = ir.load(model)
    for node in read.graph:
        behind = node.outputs[0].consumers()
        if node.op_type == operation and len(behind) == 1 and behind[0].op_type == "QuantizeLinear":
            for reader in behind[0].outputs[0].consumers():
                reader.outputs[0].replace_all_uses_with(node.outputs[0])
            ir.save(read, model)
            return node.name or ""
    raise AssertionError(f"no {operation} with a quantizer behind")


@pytest.mark.parametrize("model", ["conditional", "unet"])
@pytest.mark.parametrize("spelling", ["qdq", "integer"])
def test_verdicts_agree_with_the_built_graph(
    request: pytest.FixtureRequest, model: str, spelling: str, tmp_path: Path
) -> None:
    compiled: Compiled = request.getfixturevalue(model)
    bundle = compiled.bundle
    if spelling == "integer":
        given = {"encoder_hidden_states": prompts(2)} if model == "conditional" else None
        options: dict[str, Any] = {**QUICK, "conditions": given, "size": bundle.sample_shape[1:]}
        bundle = compile_model(compiled.exported, tmp_path / "b", recipe="w8a8-steps", **options)
    fusion = audited(bundle.model_path, tmp_path, bundle.manifest.islands)
    kernels = built_kernels(bundle.model_path, tmp_path)
    assert fusion.strays == ()
    assert fusion.failed == ()
    assert len(kernels[0]) > 15
    assert {v.name for v in fusion.verdicts if v.rule == "island"} == set(bundle.manifest.islands)
    assert disagreements(fusion.verdicts, kernels) == set()
    check_that_faults_show(fusion, kernels)
    rows = bundle.manifest.kernels.layers
    assert {row.kernel for row in rows.values()} <= FLOATS | PRODUCTS | {"QLinearConv", "QLinearMatMul"}
    assert {name: row.why for name, row in rows.items() if not row.integer} == bundle.manifest.islands


def test_a_quantizer_that_is_taken_away_is_seen(conditional: Compiled, tmp_path: Path) -> None:
    """The same in a real model: one convolution falls back to float, nothing else changes."""
    model = Path(shutil.copy(conditional.bundle.model_path, tmp_path / "model.onnx"))
    islands = conditional.bundle.manifest.islands
    before, kernels = audited(model, tmp_path, islands), built_kernels(model, tmp_path)
    name = remove_quantizer_behind(model, "Conv")
    after = audited(model, tmp_path, islands)
    assert [(v.name, v.kernel) for v in after.failed] == [(name, "Conv")]
    assert after.failed[0].rule in {"no-output-quantizer", "float-reader"}
    assert disagreements(after.verdicts, built_kernels(model, tmp_path)) == set()
    assert disagreements(before.verdicts, built_kernels(model, tmp_path))
    assert disagreements(after.verdicts, kernels)


@dataclass(frozen=True)
class Planted:
    """A model that fails by one rule, the kernel that it gets, words of the reason, and the fixed twin."""

    rule: str
    kernel: str
    words: tuple[str, ...]
    fault: str
    fixed: str
    kind: tuple[str, str] = IMAGE
    outputs: str = ""
    op: str = "Conv"


OUT2 = ", float[1,4,8,8] y2"
TIMED_X = "r = Gather (table, t) rz = Gather (ztable, t) q = QuantizeLinear (x, r, rz) d = DequantizeLinear (q, r, rz) "
Q_SIGNED = "qy = QuantizeLinear (c, s2, z8) y = DequantizeLinear (qy, s2, z8)"
FLAT = "[node] c = Transpose <perm = [0,1,3,2]> (d) "
LINEAR = "[node] c = MatMul (d, md) "
WIDE = "q = QuantizeLinear (x, s, z16) d = DequantizeLinear (q, s, z16) "
UNARY = "[node] c = {} "

Y_ALONE = "y = DequantizeLinear (qy, s2, z)"
WRITTEN = "[node] qy = QLinearConv <pads = [1,1,1,1]> (q, s, z, w, ws, wz, s2, z, b) "
PLANTED = {
    "no output quantizer": Planted(
        "no-output-quantizer", "Conv", ("'c'", "Exp ('y')"), X + W + CONV + "y = Exp (c)", X + W + CONV + Y
    ),
    "an activation in between": Planted(
        "no-output-quantizer",
        "FusedConv",
        ("Relu",),
        X + W + CONV + "e = Relu (c) qy = QuantizeLinear (e, s2, z) y = DequantizeLinear (qy, s2, z)",
        X + W + CONV + "qc = QuantizeLinear (c, s2, z) e = DequantizeLinear (qc, s2, z) y = Relu (e)",
    ),
    "a quantizer and a float node": Planted(
        "float-reader",
        "Conv",
        ("'c'", "Exp ('y2')"),
        X + W + CONV + Y + "y2 = Exp (c)",
        X + W + CONV + Y + "y2 = Exp (y)",
        outputs=OUT2,
    ),
    "a product's float reader": Planted(
        "float-reader",
        "MatMul",
        ("Exp",),
        X + M + LINEAR + Y + "y2 = Exp (c)",
        X + M + LINEAR + Y + "y2 = Exp (y)",
        TOKENS,
        ", float[1,2,3,4] y2",
        "MatMul",
    ),
    "two output scales": Planted(
        "two-output-quantizers",
        "Conv",
        ("'s2'", "'s3'"),
        X + W + CONV + Y + "q3 = QuantizeLinear (c, s3, z) y2 = DequantizeLinear (q3, s3, z)",
        X + W + CONV + Y + "q3 = QuantizeLinear (y, s3, z) y2 = DequantizeLinear (q3, s3, z)",
        outputs=OUT2,
    ),
    "the graph's output": Planted(
        "graph-output", "Conv", ("'y'",), X + W + CONV.replace(" c =", " y ="), X + W + CONV + Y
    ),
    "one activation of two": Planted(
        "float-input",
        "FusedMatMul",
        ("'turned'",),
        X + "turned = Transpose <perm = [0,1,3,2]> (x) [node] y = MatMul (d, turned)",
        X + X2 + "turned = Transpose <perm = [0,1,3,2]> (d2) [node] y = MatMul (d, turned)",
        (TOKENS[0], "float[1,2,3,3] y"),
        op="MatMul",
    ),
    "a float constant": Planted(
        "float-input",
        "Add",
        ("constant 's3'",),
        X + "[node] c = Add (d, s3) " + Y,
        X + "q3 = QuantizeLinear (s3, s, z) d3 = DequantizeLinear (q3, s, z) [node] c = Add (d, d3) " + Y,
        op="Add",
    ),
    "16 bits": Planted("sixteen-bit", "Conv", ("'d'", "UINT16"), WIDE + W + CONV + Y, X + W + CONV + Y),
    "4-bit weight": Planted(
        "narrow-weight",
        "Conv",
        ("'w4' has 4 bits",),
        X + "wd = DequantizeLinear <axis = 0> (w4, ws, w4z) " + CONV + Y,
        X + "w8 = Cast <to = 3> (w4) wd = DequantizeLinear <axis = 0> (w8, ws, wz) " + CONV + Y,
    ),
    "float bias, late scale": Planted(
        "float-bias",
        "Conv",
        ("'bf'", "'r'"),
        LATE + W + CONV_BIAS.replace("bd", "bf") + Y,
        LATE
        + "[node] qy = QLinearConv <pads = [1,1,1,1]> (q, r, z, w, ws, wz, s2, z, b) y = DequantizeLinear (qy, s2, z)",
    ),
    "a Gemm's float bias": Planted(
        "float-bias",
        "Gemm",
        ("'bf'", "no QuantizeLinear"),
        X + M + "[node] y = Gemm (d, md, bf)",
        X + M + BIAS + "[node] y = Gemm (d, md, bd)",
        ROWS,
        op="Gemm",
    ),
    "bias of a late scale": Planted(
        "bias-scale", "Conv", ("'bd'", "'r'"), LATE + W + BIAS + CONV_BIAS + Y, X + W + BIAS + CONV_BIAS + Y
    ),
    "bias of another scale": Planted(
        "bias-scale",
        "Conv",
        ("'bs_off'", "3.0%"),
        X + W + BIAS.replace("bs", "bs_off") + CONV_BIAS + Y,
        X + W + BIAS + CONV_BIAS + Y,
    ),
    "a float bias beyond int32": Planted(
        "bias-overflow",
        "QLinearConv",
        ("'bf'", "1.5e+12"),
        X + W.replace("ws", "ws_dead") + CONV_BIAS.replace("bd", "bf") + Y,
        X + W + CONV_BIAS.replace("bd", "bf") + Y,
    ),
    "a float bias of a product beyond int32": Planted(
        "bias-overflow",
        "QGemm",
        ("'bf'",),
        X + M.replace("ws", "ws_dead") + LINEAR + "a = Add (c, bf) qy = QuantizeLinear (a, s2, z) " + Y_ALONE,
        X + M + LINEAR + "a = Add (c, bf) qy = QuantizeLinear (a, s2, z) " + Y_ALONE,
        TOKENS,
        op="MatMul",
    ),
    "an int32 bias at its end": Planted(
        "bias-overflow",
        "QGemm",
        ("'bd'", "2.147e+09"),
        X + M + BIAS.replace("(b,", "(b_end,") + "[node] y = Gemm (d, md, bd)",
        X + M + BIAS + "[node] y = Gemm (d, md, bd)",
        ROWS,
        op="Gemm",
    ),
    "a written bias at its end": Planted(
        "bias-overflow",
        "QLinearConv",
        ("'b_end'",),
        X + WRITTEN.replace(", b)", ", b_end)") + Y_ALONE,
        X + WRITTEN + Y_ALONE,
        op="QLinearConv",
    ),
    "8-bit bias": Planted(
        "bias-type",
        "Conv",
        ("INT8",),
        X + W + BIAS.replace("(b,", "(b8,") + CONV_BIAS + Y,
        X + W + BIAS + CONV_BIAS + Y,
    ),
    "MatMul and Add": Planted(
        "matmul-add",
        "Gemm",
        ("'bf'",),
        X + M + LINEAR + "y = Add (c, bf)",
        X + M + BIAS + LINEAR + "y = Add (c, bd)",
        TOKENS,
        op="MatMul",
    ),
    "MatMul, late scale, and Add": Planted(
        "block-matmul",
        "MatMulNBits",
        ("'bf'", "run-time"),
        LATE + M + LINEAR + "y = Add (c, bf)",
        LATE + "[node] y = com.microsoft.MatMulIntegerToFloat (q, m, r, ws, z, wz, bf)",
        TOKENS,
        op="MatMul",
    ),
    "signed, late zero point": Planted(
        "signed-run-time",
        "Conv",
        ("'d' is signed", "'rz'"),
        TIMED_X + W + CONV + Q_SIGNED,
        TIMED_X.replace("Gather (ztable, t)", "Identity (z8)") + W + CONV + Q_SIGNED,
    ),
    "half precision": Planted(
        "half-scales",
        "Conv",
        ("'s_half' is FLOAT16",),
        "h = Cast <to = 10> (x) q = QuantizeLinear (h, s_half, z) d = DequantizeLinear (q, s_half, z) "
        "wd = DequantizeLinear <axis = 0> (w, ws_half, wz) "
        + CONV
        + "qy = QuantizeLinear (c, s2_half, z) dy = DequantizeLinear (qy, s2_half, z) y = Cast <to = 1> (dy)",
        X + W + CONV + Y,
    ),
    "mover, two scales": Planted(
        "mover-scales", "Transpose", ("'s'", "'s2'"), X + FLAT + Y, X + FLAT + SAME, op="Transpose"
    ),
    "mover, late scale": Planted(
        "mover-scales",
        "Transpose",
        ("'r'", "run time"),
        LATE + FLAT + SAME.replace("c, s,", "c, r,").replace("qy, s", "qy, r"),
        X + FLAT + SAME,
        op="Transpose",
    ),
    "mover in front": Planted(
        "mover-between",
        "Conv",
        ("Reshape ('moved')",),
        LATE.replace(" d =", " e =") + "moved = Reshape (e, image) " + W + CONV.replace("(d,", "(moved,") + Y,
        "moved = Reshape (x, image) " + LATE.replace("(x,", "(moved,") + W + CONV + Y,
    ),
    "mover behind": Planted(
        "mover-between",
        "Conv",
        ("Gather ('moved')",),
        X + W + CONV + "moved = Gather <axis = 1> (c, same) " + Y.replace("(c,", "(moved,"),
        X + W + CONV + Y.replace("y = D", "e = D") + "y = Gather <axis = 1> (e, same)",
    ),
    "Gemm with beta": Planted(
        "gemm-factors",
        "Gemm",
        ("beta is 2",),
        X + M + BIAS + "[node] y = Gemm <beta = 2.0> (d, md, bd)",
        X + M + BIAS + "[node] y = Gemm (d, md, bd)",
        ROWS,
        op="Gemm",
    ),
    "Gemm with alpha": Planted(
        "gemm-factors",
        "Gemm",
        ("alpha is 2",),
        X + M + BIAS + "[node] y = Gemm <alpha = 2.0> (d, md, bd)",
        X + M + "[node] y = Gemm <alpha = 2.0> (d, md)",
        ROWS,
        op="Gemm",
    ),
    "weight only": Planted(
        "weight-only", "Conv", ("'x' in float",), W + CONV.replace("(d,", "(x,") + Y, X + W + CONV + Y
    ),
    "weight only, product": Planted(
        "weight-only",
        "MatMulNBits",
        ("'x' in float",),
        M + "[node] y = MatMul (x, md)",
        X + M + "[node] y = MatMul (d, md)",
        TOKENS,
        op="MatMul",
    ),
    "scale for each channel": Planted(
        "per-channel-activation",
        "QLinearConv",
        ("'ss'",),
        "q = QuantizeLinear <axis = 1> (x, ss, zs) d = DequantizeLinear <axis = 1> (q, ss, zs) " + W + CONV + Y,
        X + W + CONV + Y,
    ),
    "weight scales of the inputs": Planted(
        "weight-axis",
        "MatMulIntegerToFloat",
        ("axis 0",),
        X + "md = DequantizeLinear <axis = 0> (m, steps, wz) [node] y = MatMul (d, md)",
        X + "md = DequantizeLinear <axis = 1> (m, steps, wz) [node] y = MatMul (d, md)",
        TOKENS,
        op="MatMul",
    ),
    "a transposed convolution": Planted(
        "transposed-conv",
        "ConvTranspose",
        ("transposed",),
        X + "wd = DequantizeLinear <axis = 1> (w, ws, wz) [node] c = ConvTranspose <pads = [1,1,1,1]> (d, wd) " + Y,
        X + W + CONV + Y,
        op="ConvTranspose",
    ),
    **{
        f"no kernel: {formula}": Planted(
            "no-integer-kernel",
            formula.split(" ")[0],
            (formula.split(" ")[0],),
            X + X2 + UNARY.format(formula) + Y,
            X + X2 + UNARY.format("Add (d, d2)") + Y,
            op=formula.split(" ")[0],
        )
        for formula in ("InstanceNormalization (d, one, nil)", "Gelu (d)", "Div (d, d2)", "Sub (d, d2)", "Exp (d)")
    },
    "linear Resize": Planted(
        "no-integer-kernel",
        "Resize",
        ("in this mode",),
        X + '[node] c = Resize <mode = "linear"> (d, , twice) ' + SAME,
        X + '[node] c = Resize <mode = "nearest"> (d, , twice) ' + SAME,
        (IMAGE[0], "float[1,4,16,16] y"),
        op="Resize",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_failure_is_named_and_its_fixed_twin_is_integer(case: str, tmp_path: Path) -> None:
    planted = PLANTED[case]
    model = write_groups(tmp_path, planted.fault, planted.kind, planted.outputs)
    (verdict,) = (v for v in audited(model, tmp_path).verdicts if not v.integer)
    assert verdict.failed == (planted.rule != "no-integer-kernel")
    assert (verdict.name, verdict.op, verdict.kernel, verdict.rule) == (
        "node",
        planted.op,
        planted.kernel,
        planted.rule,
    )
    assert all(word in verdict.why for word in planted.words), verdict.why
    assert verdict.fix and not verdict.integer
    counted = audited(model, tmp_path).layers
    assert counted.integer == 0 or planted.op not in ("Conv", "Gemm", "MatMul", "QLinearConv")
    fixed = audited(write_groups(tmp_path, planted.fixed, planted.kind, planted.outputs), tmp_path)
    assert fixed.failed == ()
    assert [v.integer for v in fixed.verdicts if v.name == "node"] == [True]


def test_every_rule_is_planted() -> None:
    assert {planted.rule for planted in PLANTED.values()} == {rule.id for rule in RULES}
    assert all(rule.source for rule in RULES)


def largest_difference(model: Path) -> float:
    """Between what onnxruntime computes with and without its optimizations."""
    levels: tuple[Level, ...] = ("all", "none")
    x = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    a, b = (open_session(model, threads=1, level=v).run(None, {"x": x, "t": np.array(0)})[0] for v in levels)
    return float(np.abs(a - b).max())


def test_an_integer_kernel_that_computes_something_else_is_no_success(tmp_path: Path) -> None:
    """The reason why `bias-scale` and `weight-axis` apply to integer kernels; alpha without a bias is no such case."""
    gemm = "[node] y = Gemm (d, md, bd)"
    off = write_groups(tmp_path, X + M + BIAS.replace("bs", "bs_off") + gemm, ROWS)
    (verdict,) = audited(off, tmp_path).failed
    assert (verdict.kernel, verdict.rule) == ("QGemm", "bias-scale")
    assert largest_difference(off) > 1e-3
    for nodes in (X + M + BIAS + gemm, X + M + "[node] y = Gemm <alpha = 2.0> (d, md)"):
        right = write_groups(tmp_path, nodes, ROWS)
        assert audited(right, tmp_path).totals["integer"] == 1
        assert largest_difference(right) < 1e-5
    wrong = write_groups(
        tmp_path, X + "md = DequantizeLinear <axis = 0> (m, steps, wz) [node] y = MatMul (d, md)", ROWS
    )
    assert largest_difference(wrong) > 0.1


class TestOtherFiles:
    """Files of other tools."""

    def test_unnamed_nodes_are_found_by_their_values(self, tmp_path: Path) -> None:
        nodes = (X + W + CONV + Y).replace("[node]", "") + "e = Conv (y, wf) y2 = Relu (e)"
        fusion = audited(write_groups(tmp_path, nodes, outputs=", float[1,4,6,6] y2"), tmp_path)
        told = [(v.name, v.kernel, v.integer, v.rule) for v in fusion.verdicts]
        assert told == [("c", "QLinearConv", True, ""), ("e", "Conv", False, "not-quantized")]
        assert fusion.strays == ()

    def test_that_of_onnxruntimes_own_quantizer(self, hand: Compiled, tmp_path: Path) -> None:
        calls: list[Call] = [(np.zeros((1, 1, 8, 8), np.float32), 0, {})]
        _, model = prepare_peer("onnxruntime", hand.exported, hand.bundle.signature, calls, tmp_path, 1)
        fusion = audited(model, tmp_path)
        kernels = built_kernels(model, tmp_path)
        assert disagreements(fusion.verdicts, kernels) == set()
        assert [(v.name, v.kernel) for v in fusion.verdicts if v.integer and v.op == "Conv"] == [
            (name, "QLinearConv") for name in ("first", "second", "third", "last")
        ]

    def test_unnamed_kernels_that_follow_each_other(self, hand: Compiled, tmp_path: Path) -> None:
        """All operations quantized: channels last, neither the nodes nor their outputs keep a name."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            rows = iter([{"x": np.random.default_rng(0).random((1, 1, 8, 8), np.float32), "t": np.zeros(1, np.int64)}])

            def get_next(self) -> dict[str, Any] | None:
                return next(self.rows, None)

        model = tmp_path / "all.onnx"
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(str(hand.exported), str(model), Reader(), quant_format=QuantFormat.QDQ, **kinds)
        fusion = audited(model, tmp_path)
        assert (fusion.strays, fusion.failed) == ((), ())
        assert {v.op for v in fusion.verdicts if v.integer} == {"Conv", "Gemm", "Sigmoid", "Mul", "Add", "Unsqueeze"}
        assert disagreements(fusion.verdicts, built_kernels(model, tmp_path)) == set()

    def test_operations_written_directly(self, tmp_path: Path) -> None:
        nodes = "q = QuantizeLinear (x, s, z) [node] i = MatMulInteger (q, m, z) c = Cast <to = 1> (i) y = Mul (c, s)"
        (verdict,) = audited(write_groups(tmp_path, nodes, TOKENS), tmp_path).verdicts
        assert verdict.integer and verdict.op == "MatMulInteger"

    def test_an_unexplained_group_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mezzotint.compiler.audit.rules.RULES", ())
        (verdict,) = audited(write_groups(tmp_path, X + W + CONV + "y = Exp (c)"), tmp_path).failed
        assert verdict.rule == "unknown"
        assert ort.__version__ in verdict.why

    def test_islands_do_not_fail(self, tmp_path: Path) -> None:
        model = write_groups(tmp_path, X + W + CONV + "y = Exp (c)")
        fusion = audited(model, tmp_path, {"node": "told so"})
        assert fusion.failed == ()
        assert [(v.rule, v.why, v.kernel) for v in fusion.verdicts] == [("island", "told so", "Conv")]


class TestRefusals:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no such file"):
            audited(tmp_path / "gone.onnx", tmp_path)

    def test_no_onnx_file(self, tmp_path: Path) -> None:
        (tmp_path / "text.onnx").write_text("words")
        with pytest.raises(InputError, match="cannot open the model"):
            audited(tmp_path / "text.onnx", tmp_path)

    def test_a_model_that_onnxruntime_refuses(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"operator \(MatMul\)"):
            audited(write_groups(tmp_path, "c = MatMul (x, w) " + Y), tmp_path)

    def test_no_place_for_the_built_graph(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="the folder is gone"):
            audited(write_groups(tmp_path, X + W + CONV + Y), tmp_path / "gone")

    def test_functions(self, tmp_path: Path) -> None:
        model = write_groups(tmp_path, "y = Exp (x)")
        read = onnx.load(model)
        body = onnx.helper.make_node("Exp", ["a"], ["b"])
        imports = [onnx.helper.make_opsetid("", 21)]
        read.functions.append(onnx.helper.make_function("mine", "twice", ["a"], ["b"], [body], imports))
        read.graph.node[0].domain, read.graph.node[0].op_type = "mine", "twice"
        read.opset_import.append(onnx.helper.make_opsetid("mine", 1))
        onnx.save(read, model)
        with pytest.raises(ModelError, match="functions of its own"):
            audited(model, tmp_path)
