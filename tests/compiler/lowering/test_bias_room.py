"""Biases that would pass int32, in every kind of layer and each lowering that has such biases.

Zero, tiny and ordinary weights are in one layer: each of the 16 output channels has one of four weights and one of four
biases. What a file should compute is the graph
of insert_qdq without raised scales, in float (level "none"): the accumulator of that one never overflows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.nodes import counts, numpy_of
from mezzotint.compiler.lowering import bias_room
from mezzotint.compiler.lowering.bias_room import BIAS_LIMIT, Room, make_room
from mezzotint.compiler.lowering.lower import lower
from mezzotint.compiler.lowering.qdq import lower_qdq
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.signature import Images
from tests.helpers.tiny import SIGNATURE, program_of

SIZES, BIASES = (0.0, 1e-30, 1e-9, 1.0), (0.0, 1e-6, 2.0, -3.0)
KINDS = {
    "conv": "epsilon = Conv <pads = [1, 1, 1, 1]> (sample, conv_w, bias)",
    "timed": """number = Cast <to = 1> (timestep) column = Unsqueeze (number, axis) angles = Mul (column, rates)
        waves = Cos (angles) shift = Unsqueeze (waves, axes)
        mixed = Conv <pads = [1, 1, 1, 1]> (sample, conv_w, bias) epsilon = Add (mixed, shift)""",
    "gemm": """flat = Reshape (sample, rows) product = Gemm <transB = 1> (flat, linear_w, bias)
        epsilon = Reshape (product, images)""",
    "matmul": "product = MatMul (sample, turned_w) epsilon = Add (product, bias)",
}
STATIC: tuple[Pass, ...] = (Normalize(), Observe(), ChooseScales())


def program(kind: str, biases: tuple[float, ...] = BIASES) -> Program:
    rng = np.random.default_rng(3)
    size = np.repeat(SIZES, 4).astype(np.float32)
    linear: Floats = (rng.standard_normal((16, 16)) * size[:, None] / 4).astype(np.float32)
    constants: dict[str, Any] = {
        "conv_w": (rng.standard_normal((16, 16, 3, 3)) * size[:, None, None, None] / 12).astype(np.float32),
        "linear_w": linear,
        "turned_w": np.ascontiguousarray(linear.T),
        "bias": np.tile(biases, 4).astype(np.float32),
        "rates": rng.uniform(0, 1, (1, 16)).astype(np.float32),
        "rows": np.array([-1, 16]),
        "images": np.array([-1, 16, 4, 16]),
        "axis": np.array([1]),
        "axes": np.array([2, 3]),
    }
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
    layer (float[batch,16,4,16] sample, int64[batch] timestep) => (float[batch,16,4,16] epsilon) {{ {KINDS[kind]} }}""")
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items() if n in read)
    model = ir.from_proto(proto)
    return program_of(model, shape=(16, 4, 16))


def passes(lowering: str, timed: bool) -> list[Pass]:
    if lowering == "qdq":
        return [*STATIC, InsertQdq(islands=(), lowering="qdq")]
    recipe = RECIPES["w8a8-steps"].passes
    return [replace(step, islands=()) if isinstance(step, InsertQdq) else step for step in recipe]


def outputs(model: ir.Model, context: Context, level: Any = "all") -> Images:
    x = np.random.default_rng(8).standard_normal((2, 16, 4, 16)).astype(np.float32)
    with Executor(model, context.folder, threads=1, level=level) as executor:
        return np.stack([np.asarray(executor.call(SIGNATURE, x, t)["epsilon"], np.float32) for t in (666, 0)])


def step_of(model: ir.Model) -> float:
    """The coarsest step of any quantizer in the logical graph: a result may fall to the next point of its grid."""
    scales = [v for n in model.graph if n.op_type == "QuantizeLinear" and (v := n.inputs[1]) is not None]
    return float(max(numpy_of(v).max() for v in scales if v.const_value is not None)) if scales else 0.0


CASES = [(kind, lowering) for kind in KINDS for lowering in ("qdq", "integer") if (kind, lowering) != ("timed", "qdq")]


@pytest.mark.parametrize(("kind", "lowering"), CASES)
def test_a_file_computes_what_its_plan_says(
    context: Context, monkeypatch: pytest.MonkeyPatch, kind: str, lowering: str
) -> None:
    steps = passes(lowering, kind == "timed")
    after = pipeline.run_passes(program(kind), steps, context)
    assert "larger scales" in after.history[-2 if lowering != "qdq" else -1].note
    with monkeypatch.context() as patched:
        patched.setattr("mezzotint.passes.insert_qdq.make_room", lambda *_: Room({}, {}))
        plain = pipeline.run_passes(program(kind), steps, context)
    float_model = after.require_float_model()

    exact, planned, shipped = (
        outputs(float_model, context),
        outputs(plain.model, context, "none"),
        outputs(lower(after), context),
    )

    signal = np.square(exact).mean()
    noise, least = (np.square(got - exact).mean() for got in (shipped, planned))
    assert 10 * np.log10(signal / noise) > 20  # noise of one scale is not what the rows of a table were measured on
    assert noise <= 1.3 * least + 1e-9 * signal


def test_the_plan_has_the_scales_of_the_file_and_every_bias_fits(context: Context) -> None:
    after = pipeline.run_passes(program("conv"), passes("qdq", False), context)
    plan = after.require_plan()
    stored = next(v for n, v in after.graph.initializers.items() if n == "conv_w_raised_scale")
    assert np.array_equal(plan.quantizers[Site("conv_w")].scale, numpy_of(stored))
    biases = [v for n, v in lower(after).graph.initializers.items() if n.endswith("_int32")]
    assert len(biases) == 1 and np.abs(numpy_of(biases[0])).max() <= BIAS_LIMIT


def test_one_scale_for_all_channels_is_raised_too(context: Context) -> None:
    planned = pipeline.run_passes(program("conv"), STATIC, context)
    scale, zero = np.array(1e-9, np.float32), np.array(0, np.int8)
    whole = {
        site: replace(q, scale=scale, zero_point=zero, axis=None) if site.value == "conv_w" else q
        for site, q in planned.require_plan().quantizers.items()
    }
    after = pipeline.run_passes(replace(planned, plan=Plan(whole)), [InsertQdq(islands=())], context)
    scale = after.require_plan().quantizers[Site("conv_w")].scale
    assert scale.shape == () and scale > 1e-8
    got, want = outputs(lower(after), context), outputs(after.model, context, "none")
    np.testing.assert_allclose(got, want, atol=1.01 * step_of(after.model))


def test_a_row_that_is_far_quieter_than_the_others_keeps_its_layer_in_float(context: Context) -> None:
    *steps, insert, clean = passes("integer", True)
    planned = pipeline.run_passes(program("timed"), steps, context)
    plan = planned.require_plan()
    rows = max(plan.groups) + 1
    x = next(q for site, q in plan.quantizers.items() if site.value == "sample")

    def quiet(share: float) -> Program:
        scale = np.full(rows, x.scale.max(), np.float32)
        scale[0] *= share
        table: Quantizer = replace(x, scale=scale, zero_point=np.full(rows, 128, np.uint8), table=True)
        quantizers = {**plan.quantizers, Site("sample"): table}
        return pipeline.run_passes(
            replace(planned, plan=replace(plan, quantizers=quantizers)), [insert, clean], context
        )

    assert rows > 1
    assert not quiet(1 / 100).require_plan().islands
    after = quiet(1e-5)
    ((_, reason),) = after.require_plan().islands.items()
    assert "does not fit into int32" in reason
    assert counts(lower(after).graph)["Conv"] == 1


def test_room_is_made_again_for_a_bias_that_a_later_pass_changed(context: Context) -> None:
    after = pipeline.run_passes(program("conv"), passes("qdq", False), context)
    bias = after.graph.initializers["bias"]
    bias.const_value = ir.tensor(numpy_of(bias) * np.float32(1e3), name="bias")
    with pytest.raises(PassError, match="does not fit into int32"):
        lower_qdq(after.model)
    before = numpy_of(after.graph.initializers["conv_w_raised_scale"]).copy()
    np.testing.assert_allclose(
        outputs(lower(after), context), outputs(after.model, context, "none"), atol=step_of(after.model)
    )
    assert np.array_equal(before, numpy_of(after.graph.initializers["conv_w_raised_scale"])), "the program was changed"


def test_a_bias_that_no_scale_fits_is_refused(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    after = pipeline.run_passes(program("conv"), passes("qdq", False), context)
    monkeypatch.setattr(bias_room, "BIAS_LIMIT", 1e-40)
    room = make_room(after, after.model.clone().graph)
    assert list(room.refused) and not room.raised
    with pytest.raises(PassError, match="does not fit into int32"):
        lower(after)
