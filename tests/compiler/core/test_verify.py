"""What every graph keeps, each refusal once; and an exact pass that is 1 % off is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline, verify
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import NotExact, PassError
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import numpy_of
from tests.helpers.tiny import program_of, tiny_program

Edit = Callable[[ir.Graph], None]


def by_name(graph: ir.Graph, name: str) -> ir.Node:
    return next(n for n in graph if n.outputs[0].name == name)


def dangling(graph: ir.Graph) -> None:
    by_name(graph, "b1_out").replace_input_with(1, ir.Value(name="lost", type=ir.TensorType(ir.DataType.FLOAT)))


def late(graph: ir.Graph) -> None:
    """A node that stands behind the one that reads it."""
    node = by_name(graph, "start")
    graph.remove(node)
    graph.append(node)


def twice(graph: ir.Graph) -> None:
    by_name(graph, "b1_a2").outputs[0].name = "b1_a1"


def over_a_weight(graph: ir.Graph) -> None:
    by_name(graph, "b1_a2").outputs[0].name = "out_w"


def other_output(graph: ir.Graph) -> None:
    graph.outputs[0].name = "eps"


def fewer_inputs(graph: ir.Graph) -> None:
    time = graph.inputs[1]
    number = by_name(graph, "number")
    graph.inputs.remove(time)
    time.name = "was_timestep"
    time.const_value = ir.tensor(np.array([1]), name="was_timestep")
    graph.register_initializer(time)
    assert number.inputs[0] is time


def other_type(graph: ir.Graph) -> None:
    graph.inputs[1].type = ir.TensorType(ir.DataType.INT32)  # `.dtype =` would reach into the graph it was cloned from


def forgotten(graph: ir.Graph) -> None:
    by_name(graph, "start").outputs[0].shape = None


def unknown_operation(graph: ir.Graph) -> None:
    by_name(graph, "start").op_type = "Convolve"


def wrong_attribute(graph: ir.Graph) -> None:
    by_name(graph, "start").attributes.add(ir.AttrInt64("colour", 3))


@dataclass(frozen=True)
class Edited(Pass):
    """A pass that does what a test says."""

    edit: Edit

    def run(self, program: Program, context: Context) -> Program:
        self.edit(program.graph)
        return program

    def options(self) -> dict[str, object]:
        return {}


@pytest.fixture
def program() -> Program:
    made = tiny_program()
    return replace(made, model=infer_shapes(made.model))


@pytest.mark.parametrize(
    ("edit", "message", "where"),
    [
        (dangling, "no node computes: 'lost'", "b1_out"),
        (late, "no node computes: 'start'", "b1_n1"),
        (twice, "assigned twice: 'b1_a1'", "b1_a1"),
        (over_a_weight, "assigned twice: 'out_w'", "out_w"),
        (other_output, "changed the outputs", "edited"),
        (fewer_inputs, "changed the inputs", "edited"),
        (other_type, "changed the inputs", "edited"),
        (forgotten, r"lost the shape of 'start', which was \[batch,16,8,8\]", "start"),
        (unknown_operation, "invalid ONNX model", "edited"),
        (wrong_attribute, "invalid ONNX model", "edited"),
    ],
)
def test_refusals_name_the_pass_and_the_place(
    program: Program, context: Context, edit: Edit, message: str, where: str
) -> None:
    with pytest.raises(PassError, match=message) as caught:
        pipeline.run_passes(program, [Edited(edit)], context)
    assert "edited" in str(caught.value)
    assert where in str(caught.value.where)
    assert not list(context.folder.glob("*.onnx")), "files were left behind"


def test_an_untouched_graph_passes(program: Program, context: Context) -> None:
    verify.structure(program, "nothing", before=program)


def test_absent_optional_outputs_are_not_assigned_twice(context: Context) -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,2,4,4] sample, int64[batch] timestep) => (float[batch,2,4,4] epsilon) <float[4] gamma = {1, 1, 1, 1}>
    {
        a, , spread_a = LayerNormalization (sample, gamma)
        epsilon, , spread_b = LayerNormalization (a, gamma)
    }""")
    program = program_of(model)
    verify.structure(program, "nothing", before=program)


@dataclass(frozen=True)
class Scaled(Pass):
    """Claims to keep the function and multiplies one weight."""

    weight: str = "b1_w1"
    factor: float = 1.01

    tolerance: ClassVar[float | None] = 1e-4

    def run(self, program: Program, context: Context) -> Program:
        value = program.graph.initializers[self.weight]
        value.const_value = ir.tensor(numpy_of(value) * np.float32(self.factor), name=self.weight)
        return program


@pytest.mark.parametrize("weight", ["b1_w1", "time_2_w", "frequencies", "q_w", "out_b"])
def test_one_percent_is_not_exact(program: Program, context: Context, weight: str) -> None:
    with pytest.raises(NotExact, match="scaled changed the function") as caught:
        pipeline.run_passes(program, [Scaled(weight)], context)
    assert "history: scaled" in str(caught.value.where)


def test_what_is_exact_passes(program: Program, context: Context) -> None:
    pipeline.run_passes(program, [Scaled(factor=1.0), Scaled(factor=1.0 + 1e-7)], context)


def test_nan_is_not_exact(program: Program, context: Context) -> None:
    with pytest.raises(NotExact):
        pipeline.run_passes(program, [Scaled(factor=float("nan"))], context)


def test_relative_difference() -> None:
    want = np.array([1.0, -4.0], np.float32)
    assert verify.relative_difference(want, want) == 0.0
    assert verify.relative_difference(want, want * np.float32(1.01)) == pytest.approx(0.01, rel=1e-4)
    assert verify.relative_difference(want, want[:1]) == float("inf")
    assert np.isnan(verify.relative_difference(want, want * np.float32("nan")))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(program: Program, bad: float) -> None:
    assert verify.weights_finite(program.model) is None
    value = program.graph.initializers["up_w"]
    array = numpy_of(value).copy()
    array[0, 0, 0, 0] = bad
    value.const_value = ir.tensor(array, name="up_w")
    assert verify.weights_finite(program.model) == "up_w"
