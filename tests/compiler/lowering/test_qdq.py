"""lower_qdq: golden pairs, and the same numbers before and after, within one step of the output's grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline, verify
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.lowering.qdq import lower_qdq
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.signature import Images
from tests.helpers import golden
from tests.helpers.tiny import SIGNATURE, program_of

GOLDEN = "lower_qdq"

CONV = "epsilon = Conv <pads = [1, 1, 1, 1]> (sample, conv_w, bias)"
LINEAR = "product = MatMul (sample, square) epsilon = Add (product, bias)"
GEMM = """flat = Reshape (sample, rows) product = Gemm <transB = 1> (flat, square, bias)
    epsilon = Reshape (product, images)"""


def layer_program(body: str) -> Program:
    """One layer with random weights between sample and epsilon, float [batch, 4, 4, 4]."""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    layer (float[batch,4,4,4] sample, int64[batch] timestep) => (float[batch,4,4,4] epsilon)
    <int64[2] rows = {{-1, 4}}, int64[4] images = {{-1, 4, 4, 4}}, float[4,4,3,3] conv_w, float[4,4] square,
     float[4] bias>
    {{ {body} }}""")
    rng = np.random.default_rng(11)
    named = {name: value for node in model.graph for value in node.inputs if value is not None and (name := value.name)}
    for name, shape in (("conv_w", (4, 4, 3, 3)), ("square", (4, 4)), ("bias", (4,))):
        if name in named:
            named[name].const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
            model.graph.register_initializer(named[name])
    return program_of(model, shape=(4, 4, 4))


def quantized_layer(body: str, context: Context) -> Program:
    steps = (Normalize(), Observe(), ChooseScales(), InsertQdq(islands=()))
    return pipeline.run_passes(layer_program(body), steps, context)


def outputs(model: ir.Model, context: Context, shape: tuple[int, ...], t: int = 1) -> Images:
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    with Executor(model, context.folder, threads=2) as executor:
        return np.asarray(executor.call(SIGNATURE, x, t)["epsilon"], np.float32)


def output_step(model: ir.Model) -> float:
    """One step of the grid that the output lies on; where it is not quantized, of the grid of the accumulator."""
    producer = model.graph.outputs[0].producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[1] is not None:
        return float(numpy_of(producer.inputs[1]))
    scales = [numpy_of(n.inputs[1]).max() for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[1]]
    return float(np.prod(scales))


def check_same(before: ir.Model, after: ir.Model, context: Context) -> None:
    """Within one step everywhere, and equal but for the few values where the rounding fell to the other side."""
    want, got = (outputs(m, context, (4, 4, 4, 4)) for m in (before, after))
    step = output_step(before)
    np.testing.assert_allclose(got, want, rtol=0, atol=1.01 * step)
    if step > 1e-3:
        assert np.mean(np.abs(got - want) > 0.5 * step) < 0.02


@pytest.mark.parametrize("case", golden.cases(GOLDEN))
def test_golden(request: pytest.FixtureRequest, context: Context, case: str) -> None:
    before = infer_shapes(golden.before(GOLDEN, case))
    text = golden.to_text(before)
    program = program_of(before)
    after = replace(program, model=lower_qdq(before))
    assert golden.to_text(before) == text, "the model that came in was changed"
    verify.structure(after, GOLDEN, before=program)
    golden.compare(GOLDEN, case, after.model, update=bool(request.config.getoption("--update-golden")))
    want, got = (outputs(m, context, (2, 2, 4, 4)) for m in (before, after.model))
    # The biases are multiples of the accumulator's step, so that not even they are rounded.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("body", [CONV, LINEAR, GEMM])
def test_lowering_keeps_the_numbers(context: Context, body: str) -> None:
    program = quantized_layer(body, context)
    lowered = lower_qdq(program.model)
    check_same(program.model, lowered, context)
    scale = next(v for n, v in lowered.graph.initializers.items() if n in ("conv_w_scale", "square_scale"))
    scale.const_value = ir.tensor(numpy_of(scale) * np.float32(1.01), name=scale.name)
    with pytest.raises(AssertionError):
        check_same(program.model, lowered, context)


@pytest.mark.parametrize("body", [LINEAR, GEMM])
def test_a_bias_that_is_one_percent_off_is_seen(context: Context, body: str) -> None:
    program = quantized_layer(body, context)
    lowered = lower_qdq(program.model)
    bias = next(v for n, v in lowered.graph.initializers.items() if n.endswith("_int32"))
    bias.const_value = ir.tensor(np.rint(numpy_of(bias) * 1.01).astype(np.int32), name=bias.name)
    with pytest.raises(AssertionError):
        check_same(program.model, lowered, context)


def test_every_weight_is_int8_and_every_bias_int32(tiny: Program, context: Context) -> None:
    program = pipeline.run_passes(tiny, RECIPES["w8a8"].passes, context)
    lowered = lower_qdq(program.model)
    assert program.plan is not None
    for node in lowered.graph:
        if node.op_type in ("Conv", "Gemm") and node.name not in program.plan.islands:
            producers = [v.producer() for v in node.inputs[1:] if v is not None]
            kinds = [p.inputs[0].dtype for p in producers if p is not None and p.inputs[0] is not None]
            assert kinds == [ir.DataType.INT8, ir.DataType.INT32], node.name
