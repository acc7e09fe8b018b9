"""choose_scales: every site gets the range of the method, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import INT8, UINT8, dequantize, quantize, scale_for_range
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program, Site
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.scales.ranges import RangeMethod, least_error_range
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.compare import sqnr_db


@pytest.fixture
def observed(tiny: Program, context: Context) -> Program:
    return pipeline.run_passes(tiny, [Normalize(), Observe()], context)


def planned(program: Program, context: Context, step: ChooseScales) -> Program:
    return pipeline.run_passes(program, [step], context)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_activation_ranges_are_those_of_the_method(observed: Program, context: Context, method: RangeMethod) -> None:
    after = planned(observed, context, ChooseScales(activations=method, percentile=99.0))
    assert after.plan is not None and observed.stats is not None
    for name in ("b1_a1", "weights", "down"):
        summary = observed.stats.summary(name)
        assert summary is not None
        limits = {
            "minmax": (summary.low, summary.high),
            "percentile": (summary.percentile(0.005), summary.percentile(0.995)),
            "mse": least_error_range(summary, UINT8),
        }[method]
        scale, zero = scale_for_range(*limits, UINT8)
        check_scale(after, Site(name), scale, zero)
        with pytest.raises(AssertionError):
            check_scale(after, Site(name), (scale * 1.01).astype(np.float32), zero)


def check_scale(
    program: Program, site: Site, scale: Floats, zero: npt.NDArray[np.uint8] | npt.NDArray[np.int8] | np.int8
) -> None:
    assert program.plan is not None
    quantizer = program.plan.quantizers[site]
    np.testing.assert_allclose(quantizer.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(quantizer.zero_point, zero)
    assert quantizer.by == "choose_scales"


def test_every_layer_has_its_quantizers(observed: Program, context: Context) -> None:
    plan = planned(observed, context, ChooseScales()).plan
    assert plan is not None
    for layer in layers(observed.graph):
        for value in layer.activations:
            assert plan.of(value.name or "", layer.name) is not None
        if layer.output_quantized:
            assert plan.of(layer.output.name or "") is not None
        if layer.weight is not None:
            quantizer = plan.of(layer.weight.name or "")
            assert quantizer is not None
            assert (quantizer.format, quantizer.axis) == (INT8, layer.weight_axis)
            assert quantizer.scale.shape == (numpy_of(layer.weight).shape[layer.weight_axis or 0],)
            assert not quantizer.zero_point.any()


@pytest.mark.parametrize("output_bits", [8, 5])
def test_narrow_inputs_leave_outputs_their_width(
    observed: Program, context: Context, output_bits: Literal[8, 5]
) -> None:
    """What a layer reads has 4 bits, an output that none reads has its own width, and both run in that form."""
    step = ChooseScales(activation_bits=4, output_bits=output_bits)
    plan = planned(observed, context, step).require_plan()
    every_layer = list(layers(observed.graph))
    read = {value.name for layer in every_layer for value in layer.activations}
    outputs = {layer.output.name for layer in every_layer if layer.output_quantized}
    assert outputs - read and read - outputs
    for name in read | outputs:
        assert plan.quantizers[Site(name or "")].format.bits == (4 if name in read else output_bits), name
    written = pipeline.run_passes(observed, [step, InsertQdq(islands=())], context)
    levels = [4 if np.array_equal(clip_ends(node), (0, 15)) else 5 for node in written.graph if node.op_type == "Clip"]
    assert levels.count(5) == (len(outputs - read) if output_bits == 5 else 0)
    assert levels.count(4) >= len(read)


def clip_ends(node: ir.Node) -> list[int]:
    return [int(numpy_of(value)) for value in node.inputs[1:] if value is not None]


@pytest.mark.parametrize("method", ["percentile", "mse"])
@pytest.mark.parametrize("symmetric", ["products", "all"])
def test_symmetric_activations(
    observed: Program, context: Context, symmetric: Literal["products", "all"], method: Literal["percentile", "mse"]
) -> None:
    """Zero point 0 and both ends of the range inside; a factor that is never negative stays unsigned."""
    plan = planned(observed, context, ChooseScales(symmetric=symmetric, activations=method)).require_plan()
    usual = planned(observed, context, ChooseScales(activations=method)).require_plan()
    stats = observed.require_stats()
    every_layer = list(layers(observed.graph))
    factors = {value.name for layer in every_layer if layer.kind == "attention" for value in layer.activations}
    signed = set()
    for site, quantizer in plan.quantizers.items():
        summary = stats.summary(site.value)
        if summary is None:
            continue  # a weight
        before = usual.quantizers[site]
        if symmetric == "all" or (site.value in factors and summary.low < 0):
            signed.add(site.value)
            assert quantizer.format == INT8 and not quantizer.zero_point.any()
            reach = max(int(before.zero_point), 255 - int(before.zero_point)) * float(before.scale)
            assert method == "mse" or float(quantizer.scale) * 127 == pytest.approx(reach, rel=0.01)
        else:
            assert quantizer.format == UINT8 and quantizer.zero_point == before.zero_point
            assert site.value not in factors or not quantizer.zero_point.any()
    assert signed and (symmetric == "all") == (not factors >= signed)


def weight_error(program: Program, name: str, axis: int) -> npt.NDArray[np.float64]:
    """Squared error of each output channel."""
    assert program.plan is not None
    quantizer = program.plan.quantizers[Site(name)]
    weight = numpy_of(program.graph.initializers[name])
    q = quantize(weight, quantizer.scale, quantizer.zero_point, INT8, axis)
    back = dequantize(q, quantizer.scale, quantizer.zero_point, axis)
    rows = np.moveaxis((back.astype(np.float64) - weight) ** 2, axis, 0)
    return np.asarray(rows.reshape(len(rows), -1).sum(axis=1))


@pytest.mark.parametrize(("name", "axis"), [("b1_w1", 0), ("q_w", 1), ("b1_tw", 0), ("gate_w", 1)])
def test_no_shrink_of_the_weights_is_better(observed: Program, context: Context, name: str, axis: int) -> None:
    after = planned(observed, context, ChooseScales(weights="mse"))
    assert after.plan is not None
    chosen = weight_error(after, name, axis)
    weight = np.moveaxis(numpy_of(after.graph.initializers[name]), axis, 0)
    limit = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    for shrink in np.linspace(1.0, 0.6, 21):
        scale, zero = scale_for_range(-limit * shrink, limit * shrink, INT8)
        quantizer = replace(after.plan.quantizers[Site(name)], scale=scale, zero_point=zero)
        other = replace(after, plan=replace(after.plan, quantizers={Site(name): quantizer}))
        assert np.all(chosen <= weight_error(other, name, axis) * (1 + 1e-5))
    widest = planned(observed, context, ChooseScales(weights="minmax"))
    assert widest.plan is not None
    np.testing.assert_allclose(widest.plan.quantizers[Site(name)].scale, limit / 127, rtol=1e-6)


@pytest.mark.parametrize(("name", "axis"), [("b1_w1", 0), ("q_w", 1)])
def test_the_channels_of_a_weight_may_have_one_scale(observed: Program, context: Context, name: str, axis: int) -> None:
    """It is the best one for the whole weight, not that of any channel."""
    weight = numpy_of(observed.graph.initializers[name])
    widest = planned(observed, context, ChooseScales(weights="minmax", per_channel=False))
    check_scale(widest, Site(name), np.full(weight.shape[axis], np.abs(weight).max() / 127, np.float32), np.int8(0))
    best = planned(observed, context, ChooseScales(per_channel=False))
    assert best.plan is not None
    scales = set(best.plan.quantizers[Site(name)].scale.tolist())
    assert len(scales) == 1
    assert weight_error(best, name, axis).sum() <= weight_error(widest, name, axis).sum()
    apart = planned(observed, context, ChooseScales())
    assert weight_error(best, name, axis).sum() > weight_error(apart, name, axis).sum()


@pytest.mark.parametrize(
    ("loud", "quiet", "product"), [("k_w", "q_w", "scores"), ("q_w", "k_w", "scores"), ("v_w", "proj_w", "mix")]
)
def test_a_loud_channel_of_keys_or_values_keeps_its_product_in_float(
    tiny: Program, context: Context, loud: str, quiet: str, product: str
) -> None:
    """The function stays: what one layer multiplies the other divides. 8 bits over the loud channel ruin the rest."""
    for name, factor, rows in ((loud, 60.0, False), (quiet, 1 / 60, product == "mix")):
        weight = tiny.graph.initializers[name]
        array = numpy_of(weight).copy()
        array[3 if rows else slice(None), slice(None) if rows else 3] *= np.float32(factor)
        weight.const_value = ir.tensor(array, name=name)
    program = pipeline.run_passes(tiny, [Normalize(), Observe()], context)

    def quantized(levels: float) -> Program:
        return pipeline.run_passes(program, [ChooseScales(levels=levels), InsertQdq()], context)

    with_island, without = quantized(3.0), quantized(0.0)
    assert with_island.plan is not None and without.plan is not None
    kept = {name: why for name, why in with_island.plan.islands.items() if "loud" in why}
    assert list(kept) == [product] and "levels up to its typical value" in kept[product]
    assert product not in without.plan.islands
    taps = ["mixed"] if product == "mix" else ["scaled"]
    x = np.random.default_rng(1).standard_normal((2, *program.shape)).astype(np.float32)
    errors = []
    for each in (with_island, without):
        values = []
        for model in (program.model, each.model):
            with Executor(model, context.folder, taps=taps, threads=1) as executor:
                values.append(executor.call(program.signature, x, program.deployment.timesteps[0])[taps[0]])
        if product == "mix":  # its loud channel is the larger part of the output, and as exact as ever
            values = [np.delete(value, 3, axis=-1) for value in values]
        errors.append(sqnr_db(*values))
    assert errors[0] > errors[1] + 6, errors


def test_products_of_even_activations_are_quantized(observed: Program, context: Context) -> None:
    after = planned(observed, context, ChooseScales())
    assert after.plan is not None and not after.plan.islands
    with pytest.raises(RecipeError, match="levels"):
        ChooseScales(levels=-1)


def test_statistics_of_another_graph_are_refused(observed: Program, context: Context) -> None:
    model = observed.model.clone()
    model.graph.initializers["quarter"].const_value = model.graph.initializers["out_b"].const_value
    with pytest.raises(StatsError, match="another graph"):
        planned(replace(observed, model=model), context, ChooseScales())


def test_a_value_that_was_not_measured_is_named(observed: Program, context: Context) -> None:
    stats = observed.stats
    assert stats is not None
    fewer = replace(stats, summaries={k: s for k, s in stats.summaries.items() if k[0] != "b1_a1"})
    with pytest.raises(StatsError, match="'b1_a1' was not measured"):
        planned(replace(observed, stats=fewer), context, ChooseScales())
