"""normalize: golden pairs; nodes without effect disappear; older opsets are raised; always the same numbers."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import counts
from mezzotint.passes.normalize import Normalize
from tests.conftest import Check
from tests.helpers import golden
from tests.helpers.tiny import program_of


@pytest.mark.parametrize("case", golden.cases("normalize"))
def test_golden(check_golden: Check, case: str) -> None:
    check_golden(Normalize(), case, raw=True)


def normalized(context: Context, body: str, constants: str = "", opset: int = 18) -> Program:
    """`body` computes `y` from `x`, float [batch, 4, 4, 6]; run_passes compares the outputs before and after."""
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g (float[batch,4,4,6] sample, int64[batch] timestep) => (float[batch,4,4,6] epsilon)
    <float half = {{0.5}}, float[1] one = {{1}}, float[1,1,1,1] ones = {{1}}, float zero = {{0}}, bool no = {{0}},
     int64[1] n0 = {{0}}, int64[1] n1 = {{1}}, int64[1] far = {{9223372036854775807}}
     {constants}>
    {{ x = Mul (sample, half) {body} epsilon = Sigmoid (y) }}""")
    return pipeline.run_passes(program_of(model, shape=(4, 4, 6)), [Normalize()], context)


def operations(program: Program) -> set[str]:
    return set(counts(program.graph)) - {"Sigmoid"} - ({"Mul"} if counts(program.graph)["Mul"] == 1 else set())


NOTHING = {
    "x + 0": "y = Add (x, zero)",
    "0 + x": "y = Add (zero, x)",
    "x - 0": "y = Sub (x, zero)",
    "x * 1": "y = Mul (x, ones)",
    "1 * x": "y = Mul (one, x)",
    "x / 1": "y = Div (x, one)",
    "pow(x, 1)": "y = Pow (x, one)",
    "computed one": "c = Mul (one, one) y = Div (x, c)",
    "two in a row": "a = Add (x, zero) y = Div (a, one)",
    "Identity": "y = Identity (x)",
    "Cast": "y = Cast <to = 1> (x)",
    "CastLike": "y = CastLike (x, half)",
    "Dropout": "y = Dropout (x, half, no)",
    "Reshape": "y = Reshape (x, same)",
    "Reshape to its computed shape": "s = Shape (x) y = Reshape (x, s)",
    "Flatten and back": "f = Flatten (x) y = Reshape (f, same)",
    "Unsqueeze and Squeeze": "u = Unsqueeze (x, n1) y = Squeeze (u, n1)",
    "Expand": "y = Expand (x, expanded)",
    "Expand to its computed shape": "s = Shape (x) y = Expand (x, s)",
    "Tile": "y = Tile (x, tiles)",
    "Transpose": "y = Transpose <perm = [0, 1, 2, 3]> (x)",
    "Transpose twice": "a = Transpose <perm = [0, 2, 3, 1]> (x) y = Transpose <perm = [0, 3, 1, 2]> (a)",
    "Concat": "y = Concat <axis = 1> (x)",
    "Split": "y = Split <axis = 1, num_outputs = 1> (x)",
    "Sum": "y = Sum (x)",
    "Max": "y = Max (x)",
    "Slice of everything": "y = Slice (x, n0, far, n1)",
    "Slice of an open axis": "y = Slice (x, n0, far, n0, n1)",
    "Pad": 'y = Pad <mode = "reflect"> (x, pads)',
    "Resize": 'y = Resize <mode = "linear"> (x, , scales)',
    "Clip": "y = Clip (x)",
    "MaxPool": "y = MaxPool <kernel_shape = [1, 1]> (x)",
    "DepthToSpace": "y = DepthToSpace <blocksize = 1> (x)",
    "ReduceSum over nothing": "y = ReduceSum <noop_with_empty_axes = 1> (x)",
}
CONSTANTS = """, int64[4] same = {0, 4, 4, 6}, int64[4] expanded = {1, 4, 1, 6}, int64[4] tiles = {1, 1, 1, 1},
    int64[8] pads = {0, 0, 0, 0, 0, 0, 0, 0}, float[4] scales = {1, 1, 1, 1}"""


@pytest.mark.parametrize("body", NOTHING.values(), ids=NOTHING)
def test_a_node_without_effect_disappears(context: Context, body: str) -> None:
    assert operations(normalized(context, body, CONSTANTS)) == set()


EFFECT = {
    "Mul": "y = Mul (x, half)",
    "Sub": "y = Sub (zero, x)",
    "Div": "y = Div (one, x)",
    "Pow": "y = Pow (one, x)",
    "Add": "a = Add (x, rank_5) y = Squeeze (a, n0)",
    "Reshape": "t = Transpose <perm = [0, 1, 3, 2]> (x) y = Reshape (t, same)",
    "Transpose": "y = Transpose <perm = [0, 2, 1, 3]> (x)",
    "Concat": "h, k = Split <axis = 1, num_outputs = 2> (x) y = Concat <axis = 1> (k, h)",
    "Slice": "y = Slice (x, last, first, n1, back)",
    "Pad": "p = Pad (x, pads) y = Slice (p, n1, far, n1)",
    "Expand": "a = ReduceMean <keepdims = 1> (x, n1) y = Expand (a, expanded)",
    "Clip": "y = Clip (x, zero)",
    "Resize": 'r = Resize <mode = "nearest"> (x, , scales) y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)',
    "ReduceSum": "s = ReduceSum <keepdims = 1> (x) y = Add (x, s)",
}
OTHERS = """, float[1,1,1,1,1] rank_5 = {0}, int64[4] same = {0, 4, 4, 6}, int64[1] last = {-1}, int64[1] back = {-1},
    int64[1] first = {-9223372036854775807}, int64[8] pads = {0, 1, 0, 0, 0, 0, 0, 0}, int64[4] expanded = {1, 4, 1, 1},
    float[4] scales = {1, 1, 2, 2}"""


@pytest.mark.parametrize("op", EFFECT)
def test_a_node_with_an_effect_stays(context: Context, op: str) -> None:
    assert op in counts(normalized(context, EFFECT[op], OTHERS).graph)


RAISED = {
    "ReduceMean": "m = ReduceMean <axes = [2, 3], keepdims = 1> (x) y = Sub (x, m)",
    "ReduceMax": "m = ReduceMax <axes = [-1]> (x) y = Sub (x, m)",
    "Split": "a, b = Split <axis = 1> (x) y = Concat <axis = 1> (b, a)",
    "Resize": 'r = Resize <mode = "linear", coordinate_transformation_mode = "pytorch_half_pixel"> (x, , scales)'
    " y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (r)",
    "Pad": 'p = Pad <mode = "edge"> (x, pads) y = Slice (p, n1, far, n1)',
    "Softmax": "y = Softmax <axis = 1> (x)",
    "BatchNormalization": "y = BatchNormalization (x, four, four, four, four)",
    "If": "s = ReduceSum <keepdims = 0> (x) c = Greater (s, zero) y = If (c) <"
    "then_branch = t () => (float[batch,4,4,6] p) { q = ReduceMean <axes = [2, 3]> (x) p = Add (x, q) },"
    "else_branch = e () => (float[batch,4,4,6] r) { h = ReduceMax <axes = [1]> (x) r = Add (x, h) }>",
}
OLD = """, float[4] scales = {1, 1, 2, 2}, int64[8] pads = {0, 1, 0, 0, 0, 0, 0, 0}, float[4] four = {1, 2, 3, 4}"""


@pytest.mark.parametrize("opset", [13, 14, 16, 17])
@pytest.mark.parametrize("op", RAISED)
def test_an_older_opset_is_raised(context: Context, op: str, opset: int) -> None:
    after = normalized(context, RAISED[op], OLD, opset)
    assert after.model.opset_imports[""] == 18
    assert after.history[-1].note.startswith(f"opset {opset} raised to 18")
    assert op in counts(after.graph)
    assert all(value.shape is not None for node in after.graph for value in node.outputs)


def test_a_group_norm_of_an_older_exporter_has_known_shapes(context: Context) -> None:
    """With its shapes taken at run time, nothing behind it had a known rank at opset 13."""
    body = """f = Reshape (x, groups) n = InstanceNormalization (f, one2, zero2) s = Shape (x) b = Reshape (n, s)
        y = Add (b, x)"""
    constants = ", int64[3] groups = {0, 2, -1}, float[2] one2 = {1, 1}, float[2] zero2 = {0, 0}"
    after = normalized(context, body, constants, 13)
    assert all(value.shape is not None for node in after.graph for value in node.outputs)
    assert "Shape" not in counts(after.graph)


def test_what_cannot_be_raised_stays_and_is_named(context: Context) -> None:
    body = "y, mean, var, m2, v2 = BatchNormalization (x, four, four, four, four)"
    after = normalized(context, body, OLD, 13)
    assert after.model.opset_imports[""] == 13
    assert after.history[-1].note.startswith("opset 13 stays, because onnx cannot convert the model: ")
