"""Layouts: integer convolutions that onnxruntime does not change, float ones without a bias from a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import counts, model_text, name_of, numpy_of
from mezzotint.compiler.lowering import integer
from mezzotint.compiler.lowering.layout import hide_ranks, split_biases, transpose_integers
from mezzotint.passes.fold_time import FoldTime
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.session import open_session
from mezzotint.runtime.signature import Images
from tests.helpers.layers import TIMED, layer_program
from tests.helpers.tiny import CONVS, SIGNATURE, program_of, tiny_program

ENDS = ("first", "last")


def steps(islands: tuple[str, ...] = ENDS) -> list[Pass]:
    return [replace(p, islands=islands) if isinstance(p, InsertQdq) else p for p in RECIPES["w8a8-steps"].passes]


def without(name: str, monkeypatch: pytest.MonkeyPatch, program: Program) -> ir.Model:
    """Lower a program with one of the two functions replaced by one that does nothing."""
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(integer, name, nothing)
        return integer.lower_integer(program)


def built(model: ir.Model, folder: Path) -> onnx.GraphProto:
    """Return the graph that onnxruntime builds of a model."""
    file = folder / "built.onnx"
    open_session(store.write(model, folder, "model"), threads=1, optimized=file)
    return onnx.load(file, load_external_data=False).graph


def outputs(program: Program, model: ir.Model, context: Context) -> Images:
    x = np.random.default_rng(4).standard_normal((3, *program.shape)).astype(np.float32)
    with Executor(model, context.folder, threads=1) as executor:
        return np.stack([executor.call(SIGNATURE, x, t)["epsilon"] for t in program.deployment.timesteps])


def check_left_alone(graph: onnx.GraphProto) -> None:
    """Every integer convolution is the standard one, and no feature map is transposed for one."""
    convs = [node for node in graph.node if node.op_type == "QLinearConv"]
    assert len(convs) == CONVS
    assert {node.domain for node in convs} <= {"", "ai.onnx"}
    assert not any(a.name == "channels_last" and a.i for node in convs for a in node.attribute)
    made = {out: node for node in graph.node for out in node.output}
    turned = {node.output[0] for node in graph.node if node.op_type == "Transpose"}
    read = {value for node in graph.node if node.op_type == "Transpose" for value in node.input}
    for node in convs:
        source = made[node.input[0]]
        assert node.output[0] not in read and not {node.input[0], *source.input[:1]} & turned


@pytest.fixture
def quantized(context: Context) -> Program:
    return pipeline.run_passes(tiny_program(), steps(), context)


def test_integer_convolutions_are_left_as_they_are(
    quantized: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_left_alone(built(integer.lower_integer(quantized), context.folder))
    with pytest.raises(AssertionError):
        check_left_alone(built(without("hide_ranks", monkeypatch, quantized), context.folder))


def test_hidden_ranks_change_no_bit(quantized: Program, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = integer.lower_integer(quantized)
    got, want = (outputs(quantized, m, context) for m in (lowered, without("hide_ranks", monkeypatch, quantized)))
    np.testing.assert_array_equal(got, want)
    scale = next(v for n, v in lowered.graph.initializers.items() if n == "scales_table")
    scale.const_value = ir.tensor(numpy_of(scale) * np.float32(1.01), name=scale.name)
    assert np.any(outputs(quantized, lowered, context) != want)


def test_every_image_size_and_batch_still_fits(quantized: Program, context: Context) -> None:
    lowered = integer.lower_integer(quantized)
    reshapes = [n for n in lowered.graph if n.op_type == "Reshape" and n.outputs[0].shape is None]
    assert len(reshapes) == CONVS
    with Executor(lowered, context.folder, threads=1) as executor:
        for batch in (1, 2, 5):
            x = np.zeros((batch, 1, 8, 8), np.float32)
            assert executor.call(SIGNATURE, x, 0)["epsilon"].shape == x.shape


def test_a_graph_without_a_table_is_left_as_it_is(context: Context) -> None:
    static = [p for p in RECIPES["w8a8"].passes if p.name != "freeze_time"]
    program = pipeline.run_passes(tiny_program(), static, context)
    before = model_text(program.model)
    hide_ranks(program.graph, [n for n in program.graph if n.op_type == "Conv"])
    split_biases(program.graph)
    assert model_text(program.model) == before


LABELS = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,2,4,4] x, {label} label) => (float[batch,2,4,4] y)
    <int64[1] flat = {{-1}}, float[3,2] table = {{1, 2, 3, 4, 5, 6}}, float[2,2,1,1] w = {{1, 0, 0, 1}}>
    {{ {rows} shift = Gather <axis = 0> (table, index) y = Conv (x, w) }}"""


@pytest.mark.parametrize(
    ("label", "rows"),
    [
        ("int64[batch]", "index = Reshape (label, flat)"),
        ("int64[1]", "index = Reshape (label, flat)"),
        ("int32[batch]", "number = Identity (label) index = Reshape (number, flat)"),
        ("int64[batch]", "number = Identity (label) index = Reshape (number, flat)"),
    ],
)
def test_an_embedding_of_labels_is_no_table(label: str, rows: str) -> None:
    """It has a row for each sample, so that its index is no single number."""
    model = infer_shapes(ir.from_onnx_text(LABELS.format(label=label, rows=rows)))
    before = model_text(model)
    hide_ranks(model.graph, [n for n in model.graph if n.op_type == "Conv"])
    assert model_text(model) == before


# Biases of islands


def timed_island(context: Context) -> Program:
    """One convolution in float whose bias is a row, and whose output is the graph's."""
    program = pipeline.run_passes(layer_program(TIMED), [Normalize(), FreezeTime(), FoldTime()], context)
    assert counts(program.graph)["Conv"] == 1 and "Add" not in counts(program.graph)
    return program


def test_the_bias_of_an_island_is_added_behind_it(context: Context) -> None:
    program = timed_island(context)
    want = outputs(program, program.model, context)
    split = program.model.clone()
    split_biases(split.graph)
    (conv,) = (n for n in split.graph if n.op_type == "Conv")
    assert len(conv.inputs) == 2 and counts(split.graph)["Add"] == 1
    assert [name_of(v) for v in split.graph.outputs] == ["epsilon"]
    np.testing.assert_allclose(outputs(program, split, context), want, rtol=1e-5, atol=1e-5)
    table = next(v for n, v in split.graph.initializers.items() if n.endswith("bias_table"))
    table.const_value = ir.tensor(numpy_of(table) * np.float32(1.01), name=table.name)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(outputs(program, split, context), want, rtol=1e-5, atol=1e-5)


def test_all_who_read_an_island_read_behind_its_bias(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pipeline.run_passes(tiny_program(), steps((*ENDS, "b1_conv1")), context)
    lowered = integer.lower_integer(program)
    (conv,) = (n for n in lowered.graph if n.name == "b1_conv1")
    assert len(conv.inputs) == 2
    (add,) = (use.node for use in conv.outputs[0].uses())
    assert add.op_type == "Add"
    got, want = (outputs(program, m, context) for m in (lowered, without("split_biases", monkeypatch, program)))
    np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * np.abs(want).max())
    assert np.median(np.abs(got - want)) < 1e-3 * np.abs(want).max()


def test_constant_biases_stay(context: Context) -> None:
    program = pipeline.run_passes(tiny_program(), [Normalize()], context)
    before = model_text(program.model)
    split_biases(program.graph)
    assert model_text(program.model) == before


def transposed(scale: str, zero_point: str, size: str, *, also_read: bool = False) -> ir.Model:
    end = "other = Reshape (x, back) epsilon = Add (turned, other)" if also_read else "epsilon = Neg (turned)"
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[batch,3,4,4] sample, int64[batch] timestep) => (float[batch,4,4,3] epsilon)
    <float{size} s = {{{scale}}}, uint8{size} z = {{{zero_point}}}, int64[4] back = {{0, 4, 4, 3}}>
    {{ q = QuantizeLinear <axis = 1> (sample, s, z) x = DequantizeLinear <axis = 1> (q, s, z)
       turned = Transpose <perm = [0, 2, 3, 1]> (x) {end} }}"""
    return infer_shapes(ir.from_onnx_text(text))


@pytest.mark.parametrize(
    ("scale", "zero_point", "size"), [("0.01, 0.02, 0.03", "120, 130, 140", "[3]"), ("0.02", "130", "")]
)
def test_a_transpose_moves_integers(context: Context, scale: str, zero_point: str, size: str) -> None:
    """Left behind it, onnxruntime quantizes scales of channels a second time: the reason for the rewrite."""
    before = transposed(scale, zero_point, size)
    after = before.clone()
    transpose_integers(after.graph)
    (move,) = (node for node in after.graph if node.op_type == "Transpose")
    assert move.outputs[0].dtype == ir.DataType.UINT8
    program = program_of(before, shape=(3, 4, 4))
    np.testing.assert_array_equal(outputs(program, after, context), outputs(program, before, context))
    quantizers = [
        sum(n.op_type == "QuantizeLinear" for n in built(model, context.folder).node) for model in (before, after)
    ]
    assert quantizers == ([2, 1] if size else [1, 1])


def test_what_others_read_too_is_dequantized_first(context: Context) -> None:
    model = transposed("0.02", "130", "", also_read=True)
    before = model_text(model)
    transpose_integers(model.graph)
    assert model_text(model) == before
