"""insert_qdq: golden pairs, islands, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import INT8, UINT8, Format, along, scale_for_range
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import is_constant, name_of, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.lowering.lower import lower
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.runtime.sampling import samplers
from tests.conftest import Check
from tests.helpers.tiny import tiny_program


def activation(scale: float, zero_point: int = 128) -> Quantizer:
    return Quantizer(UINT8, np.array(scale, np.float32), np.array(zero_point, np.uint8), "test")


def planned(program: Program) -> Program:
    """A plan with a different scale for every activation, and the weights' extremes."""
    quantizers: dict[Site, Quantizer] = {}
    for layer in layers(program.graph):
        for value in (*layer.activations, layer.output):
            if not is_constant(value):
                quantizers.setdefault(Site(name_of(value)), activation(0.125 * (len(quantizers) + 1)))
        if layer.weight is not None and layer.weight_axis is not None:
            rows = np.moveaxis(numpy_of(layer.weight), layer.weight_axis, 0)
            limit = np.abs(rows).reshape(len(rows), -1).max(axis=1)
            scale, zero = scale_for_range(-limit, limit, INT8)
            quantizers[Site(name_of(layer.weight))] = Quantizer(INT8, scale, zero, "test", layer.weight_axis)
    return replace(program, plan=Plan(quantizers))


@pytest.mark.parametrize("case", ["conv_float_reader", "conv_to_conv", "linear_bias", "attention"])
def test_golden(check_golden: Check, case: str) -> None:
    check_golden(InsertQdq(islands=()), case, prepare=planned)


def test_golden_islands(check_golden: Check) -> None:
    after = check_golden(InsertQdq(islands=("first", "last", "attention", "mid_l*")), "islands", prepare=planned)
    assert after.plan is not None
    assert after.plan.islands == {
        "conv_in": "island 'first': it reads the sample",
        "conv_out": "island 'last': it makes the output",
        "scores": "island 'attention': a matmul of two activations",
        "mid_linear": "island 'mid_l*'",
    }


def test_golden_consumer_site(check_golden: Check) -> None:
    """One of three readers wants a grid of its own; the others share that of the value."""

    def prepare(program: Program) -> Program:
        plan = planned(program).plan
        assert plan is not None
        own = {Site("a", "fine"): activation(0.01), Site("start", "other"): activation(0.02)}
        return replace(program, plan=Plan({**plan.quantizers, **own}))

    check_golden(InsertQdq(islands=()), "consumer_site", prepare=prepare)


def test_golden_row_widths(check_golden: Check) -> None:
    """Weights are cut off at the ends of their rows; one that an Add also reads stays next to its copy."""

    def prepare(program: Program) -> Program:
        """Of 2 and 8 bits, which needs no Clip, and of 2 and 4; steps of 0.5."""
        plan = planned(program).plan
        assert plan is not None
        quantizers = dict(plan.quantizers)
        for name, bits in (("kernel", [2, 8]), ("weight", [4, 2, 2, 4])):
            widest = Format(max(bits), signed=True, symmetric=True)
            scale = np.full(len(bits), 0.5, np.float32)
            quantizers[Site(name)] = replace(
                plan.quantizers[Site(name)], format=widest, scale=scale, row_bits=np.array(bits, np.int8)
            )
        return replace(program, plan=Plan(quantizers))

    after = check_golden(InsertQdq(islands=()), "row_widths", prepare=prepare)
    assert "kernel" not in after.graph.initializers
    kernel, weight = (numpy_of(after.graph.initializers[f"{name}_rows"]) for name in ("kernel", "weight"))
    assert kernel.reshape(-1).tolist() == [0.5, 0.5, -3, 4]
    assert weight[1].tolist() == [0, 0.5, 0.5, 0] and weight[3].tolist() == [-3.5, 0, 0, 1]


def test_golden_codebook(check_golden: Check) -> None:
    """Weights go to the levels of their codebook, one for all of a weight or one for each row."""

    def prepare(program: Program) -> Program:
        plan = planned(program).plan
        assert plan is not None
        quantizers, eight = dict(plan.quantizers), Format(8, signed=True, symmetric=True)
        rows = [[-9, 0, 6], [-4, -1, 2], [-1, 0, 1], [-7, 0, 3]]
        for name, levels in (("kernel", [-5, 1, 7]), ("weight", rows)):
            scale = np.full(2 if name == "kernel" else 4, 0.5, np.float32)
            quantizers[Site(name)] = replace(
                plan.quantizers[Site(name)], format=eight, scale=scale, levels=np.array(levels, np.int8)
            )
        return replace(program, plan=Plan(quantizers))

    after = check_golden(InsertQdq(islands=()), "codebook", prepare=prepare)
    kernel, weight = (numpy_of(after.graph.initializers[f"{name}_rows"]) for name in ("kernel", "weight"))
    assert set(kernel.reshape(-1).tolist()) <= {-2.5, 0.5, 3.5}
    assert set(weight[:, 1].tolist()) <= {-2, -0.5, 1} and set(weight[:, 2].tolist()) <= {-0.5, 0, 0.5}


def test_an_island_that_matches_nothing_is_refused(tiny: Program, context: Context) -> None:
    with pytest.raises(RecipeError, match="'upper\\*' matches no layer") as caught:
        InsertQdq(islands=("first", "upper*")).run(planned(tiny), context)
    assert "time_1" in str(caught.value.hint)


def test_a_layer_without_a_plan_stays_in_float_and_is_listed(context: Context) -> None:
    made = tiny_program()
    program = planned(replace(made, model=infer_shapes(made.model)))
    assert program.plan is not None
    fewer = {site: q for site, q in program.plan.quantizers.items() if site.value != "down"}
    after = InsertQdq(islands=()).run(replace(program, plan=Plan(fewer)), context)
    assert after.plan is not None
    assert after.plan.islands == {"down": "the plan has no quantizer for it"}


def test_the_graph_behind_every_pass_runs(tiny: Program, context: Context) -> None:
    """Optimized as users run it: a scale that a fused kernel refuses shows there and nowhere else."""
    x = np.zeros((1, *tiny.shape), np.float32)
    program = tiny
    for step in with_options(RECIPES["w8a8-steps"], {"insert_qdq.islands": ["first", "last"]}).passes:
        program = pipeline.run_passes(program, [step], context)
        with Executor(program.model, context.folder, threads=2) as executor:
            for t in program.deployment.timesteps:
                assert np.isfinite(executor.call(program.signature, x, t)["epsilon"]).all(), step.name


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-constant", "w8a8-steps"])
def test_weights_alone_are_quantized_where_activations_stay_in_float(context: Context, recipe: str) -> None:
    settings = {"choose_scales.activation_bits": "float", "choose_scales.weight_bits": 4}
    steps = [p for p in with_options(RECIPES[recipe], settings).passes if p.name != "round_weights"]
    program = pipeline.run_passes(tiny_program(), steps, context)
    assert all(is_constant(node.inputs[0]) for node in program.graph if node.op_type == "QuantizeLinear")
    plan, floats = program.require_plan(), program.require_float_model().clone()
    rounded = 0
    for layer in layers(floats.graph):
        if layer.weight is None or layer.name in plan.islands:
            continue
        quantizer = plan.of(name_of(layer.weight), layer.name)
        assert quantizer is not None and quantizer.format.bits == 4
        s = along(quantizer.scale, quantizer.axis, 4 if layer.kind == "conv" else 2)
        q = np.clip(np.rint(numpy_of(layer.weight) / s), quantizer.format.qmin, quantizer.format.qmax)
        layer.weight.const_value = ir.tensor((s * q).astype(np.float32), name=layer.weight.name)
        rounded += 1
    assert rounded > 5
    assert {r for name, r in plan.islands.items() if "attention" in name} <= {"the plan has no quantizer for it"}
    x = samplers.initial_noise(0, (1, *program.shape))
    t = program.deployment.timesteps[0]
    with (
        Executor(lower(program), context.folder, threads=1) as lowered,
        Executor(floats, context.folder, threads=1) as reference,
    ):
        got, want = (net.call(program.signature, x, t)["epsilon"] for net in (lowered, reference))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
