"""A part of a graph computes what the whole graph computes there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor, feeds
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.rounding.layer_inputs import chosen_latents
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.training.array_files import ArrayFiles
from mezzotint.compiler.training.block_data import record
from mezzotint.compiler.training.subgraph import Subgraph, cut_out
from mezzotint.passes.recipes.catalog import RECIPES
from tests.helpers.tiny import program_of, tiny_program

STEPS = 3


@pytest.fixture
def program(context: Context) -> Program:
    return pipeline.run_passes(tiny_program(steps=STEPS), RECIPES["w8a8-steps"].passes, context)


def part_of(program: Program, *nodes: str) -> Subgraph:
    assert program.float_model is not None
    floats = {name_of(v) for node in program.float_model.graph for v in node.outputs}
    return cut_out(program.model, nodes, program.signature, floats, "test")


def layer_parts(program: Program) -> list[str]:
    return [name_of(weight.readers[0].outputs[0]) for weight in find_weights(program.graph)]


def test_every_layer_computes_what_the_whole_graph_does(program: Program, context: Context) -> None:
    latents = chosen_latents(program, replace(context, samples=2), STEPS)
    compared = 0
    for name in layer_parts(program):
        part = part_of(program, name)
        files = ArrayFiles(context.folder)
        data = record(program, context, part, latents, name, lambda: None, files)
        with (
            Executor(part.model, context.folder, threads=1, level="none") as alone,
            Executor(program.model, context.folder, taps=part.outputs, threads=1, level="none") as whole,
        ):
            for call, batch in zip(latents, data, strict=True):
                want = whole.call(program.signature, call.x, call.timestep, call.conditions)
                fed = dict(batch.inputs)
                if program.signature.timestep in alone.inputs:
                    every = {name_of(v): v for v in program.graph.inputs}
                    time = feeds(every, program.signature, call.x, call.timestep)[program.signature.timestep]
                    fed[program.signature.timestep] = time
                got = alone.run(fed)
                for output in part.outputs:
                    # The prefix of `record` runs at another level: ties may round to the other neighbour.
                    assert np.sum((got[output] - want[output]) ** 2) < 1e-3 * np.sum(want[output] ** 2)
                    assert batch.targets[output].shape == want[output].shape
                    compared += 1
        assert list(context.folder.glob("training-*"))
        files.close()
    assert compared >= STEPS * len(layer_parts(program)) > 0
    assert not list(context.folder.glob("training-*"))


def test_the_output_of_a_convolution_is_behind_its_quantizer(program: Program) -> None:
    convolution = next(w.readers[0] for w in find_weights(program.graph) if w.readers[0].op_type == "Conv")
    part = part_of(program, name_of(convolution.outputs[0]))
    producer = next(v.producer() for v in part.model.graph.outputs)
    assert producer is not None and producer.op_type == "DequantizeLinear"
    assert part.targets == (name_of(convolution.outputs[0]),)


def test_a_part_that_nothing_leaves_is_refused(program: Program) -> None:
    with pytest.raises(PassError, match="nothing leaves"):
        part_of(program, "no such value")


SIZES = """<ir_version: 10, opset_import: ["" : 21]>
sizes (float[batch,4,8,8] sample, int64[batch] timestep) => (float[batch,4,8,8] epsilon)
<float[4,4,1,1] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float scale = {0.0625}, uint8 zero = {128},
 float w_scale = {0.0078125}, int8 w_zero = {0}, int64[2] flat = {0, -1}> {
    x_q = QuantizeLinear (sample, scale, zero)
    x = DequantizeLinear (x_q, scale, zero)
    w_q = QuantizeLinear (w, w_scale, w_zero)
    w_d = DequantizeLinear (w_q, w_scale, w_zero)
    first = Conv (x, w_d)
    y_q = QuantizeLinear (first, scale, zero)
    y = DequantizeLinear (y_q, scale, zero)
    size = Shape (y_q)
    rows = Reshape (y, flat)
    loud = Sigmoid (rows)
    back = Reshape (loud, size)
    z_q = QuantizeLinear (back, scale, zero)
    z = DequantizeLinear (z_q, scale, zero)
    second = Conv (z, w_d)
    epsilon = Reshape (second, size)
}"""


def test_sizes_do_not_bring_the_nodes_that_compute_the_value() -> None:
    """The second convolution and the Reshape around it read the size of what the first one computes."""
    model = ir.from_onnx_text(SIZES)
    program = program_of(model, shape=(4, 8, 8))
    floats = {"first", "rows", "loud", "back", "second", "epsilon"}
    later = cut_out(model, {"back", "second", "epsilon"}, program.signature, floats, "test")
    assert set(later.inputs) == {"loud", "y_q"} and later.outputs == ("epsilon",)
    assert "first" not in {name_of(v) for node in later.model.graph for v in node.outputs}
    first = cut_out(model, {"first"}, program.signature, floats, "test")
    assert first.inputs == ("sample",) and first.outputs[-1] == "y" and len(first.model.graph) == 7


def test_a_quantizer_that_two_parts_share_is_no_output_of_either() -> None:
    text = SIZES.replace(
        "epsilon = Reshape (second, size)",
        """third = Conv (x, w_d)
    both = Add (second, third)
    epsilon = Reshape (both, size)""",
    )
    model = ir.from_onnx_text(text)
    signature = program_of(model, shape=(4, 8, 8)).signature
    part = cut_out(model, {"x_q", "x", "third"}, signature, {"third"}, "test")
    assert part.inputs == ("sample",) and part.outputs == ("third",), "the first convolution reads x too"
