"""One layer between `sample` and `epsilon`, float [batch, 4, 4, 4], for the tests of the spellings with tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.core import verify
from mezzotint.compiler.core.program import Plan, Program
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.runtime.signature import Images
from tests.helpers import golden
from tests.helpers.tiny import program_of

CONV = "epsilon = Conv <pads = [1, 1, 1, 1]> (sample, conv_w, bias)"
TIMED = """number = Cast <to = 1> (timestep) column = Unsqueeze (number, axis) angles = Mul (column, frequencies)
    waves = Cos (angles) shift = Unsqueeze (waves, axes)
    mixed = Conv <pads = [1, 1, 1, 1]> (sample, conv_w, bias) epsilon = Add (mixed, shift)"""
LINEAR = "product = MatMul (sample, square) epsilon = Add (product, bias)"
PLAIN = "epsilon = MatMul (sample, square)"
GEMM = """flat = Reshape (sample, rows) product = Gemm <transB = 1> (flat, square, bias)
    epsilon = Reshape (product, images)"""
SHAPES = {"conv_w": (4, 4, 3, 3), "square": (4, 4), "bias": (4,), "frequencies": (1, 4)}


def layer_program(body: str) -> Program:
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    layer (float[batch,4,4,4] sample, int64[batch] timestep) => (float[batch,4,4,4] epsilon)
    <int64[2] rows = {{-1, 4}}, int64[4] images = {{-1, 4, 4, 4}}, int64[1] axis = {{1}}, int64[2] axes = {{2, 3}},
     float[4,4,3,3] conv_w, float[4,4] square, float[4] bias, float[1,4] frequencies>
    {{ {body} }}""")
    rng = np.random.default_rng(11)
    named = {name_of(value): value for node in model.graph for value in node.inputs if value is not None}
    for name, shape in SHAPES.items():
        array = rng.standard_normal(shape).astype(np.float32)
        if name in named:
            named[name].const_value = ir.tensor(array, name=name)
            model.graph.register_initializer(named[name])
    return program_of(model, shape=(4, 4, 4))


def filling(program: Program, call: int) -> Images:
    """Input that fills the grid of the layer's activation at one call, float32 [8, 4, 4, 4]."""
    assert program.plan is not None
    quantizer = program.plan.of("sample") or program.plan.of("flat")
    assert quantizer is not None
    row = program.plan.groups[call] if quantizer.table else 0
    scale, zero = float(quantizer.scale.reshape(-1)[row]), int(quantizer.zero_point.reshape(-1)[row])
    integers = np.random.default_rng(call).uniform(-0.5, 255.5, (8, 4, 4, 4))
    return np.asarray((integers - zero) * scale, np.float32)


def plant(model: ir.Model, ending: str) -> None:
    """Make one table or constant, the first one whose name ends so, one per cent larger."""
    value = next(v for n, v in model.graph.initializers.items() if n.endswith(ending))
    array = numpy_of(value)
    larger = np.rint(array * 1.01) if array.dtype == np.int32 else array * np.float32(1.01)
    value.const_value = ir.tensor(larger.astype(array.dtype), name=value.name)


def lowered_golden(
    folder: str, case: str, lower: Callable[[Program], ir.Model], update: bool
) -> tuple[Program, Program]:
    """(the program of a golden pair, what a lowering makes of it), compared with the pair; three calls, two groups."""
    before = infer_shapes(golden.before(folder, case))
    text = golden.to_text(before)
    program = replace(program_of(before, num_train=6), plan=Plan(groups=(0, 1, 1)))
    assert program.deployment.timesteps == (4, 2, 0)
    after = replace(program, model=lower(program))
    assert golden.to_text(before) == text, "the model that came in was changed"
    verify.structure(after, folder, before=program)
    golden.compare(folder, case, after.model, update=update)
    return program, after
