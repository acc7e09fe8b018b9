"""lower_premul: golden pairs, the quantized graph's numbers within a step, constant parameters, integer kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mezzotint import compile_model
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import counts, is_constant, name_of, numpy_of
from mezzotint.compiler.lowering.premul import lower_premul
from mezzotint.compiler.lowering.qdq import lower_qdq
from mezzotint.compiler.scales.timetable import rows_and_index
from mezzotint.passes.channel_scales import ChannelScales
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.step_scales import StepScales
from mezzotint.runtime.signature import Images
from tests.helpers import golden
from tests.helpers.layers import CONV, GEMM, LINEAR, PLAIN, TIMED, filling, layer_program, lowered_golden, plant
from tests.helpers.models import INTEGER, SMALL, Compiled
from tests.helpers.tiny import SIGNATURE, tiny_program

GOLDEN = "lower_premul"
SETTINGS = {
    "insert_qdq.lowering": "premul",
    "insert_qdq.islands": ["first", "last"],
    "step_scales.zero_point": "constant",
    "channel_scales.gain": 1000.0,
}
Bits = Literal[4, 8]
ATTENTION = "turned = Transpose <perm = [0, 1, 3, 2]> (sample) epsilon = MatMul (sample, turned)"


def passes(islands: tuple[str, ...] = ("first", "last"), gain: float = 0.2, bits: Bits = 8) -> list[Pass]:
    """Recipe w8a8-steps with this lowering; at a `gain` of -1000 dB everything gets a table, at 1000 nothing.

    Channels have zero points of their own, which it does not know.
    """
    steps: list[Pass] = []
    for step in RECIPES["w8a8-steps"].passes:
        if isinstance(step, ChannelScales):
            continue
        if isinstance(step, InsertQdq):
            step = replace(step, islands=islands, lowering="premul")
        elif isinstance(step, StepScales):
            step = replace(step, gain=gain, zero_point="constant")
        elif isinstance(step, ChooseScales):
            step = replace(step, activation_bits=bits, weight_bits=bits)
        steps.append(step)
    return steps


def run(model: ir.Model, context: Context, x: Images, t: float) -> Images:
    with Executor(model, context.folder, threads=2, level="basic") as executor:
        return np.asarray(executor.call(SIGNATURE, x, t)["epsilon"], np.float32)


def output_step(model: ir.Model) -> float:
    """Return the widest step of the grids of convolution outputs, multiplied back; 0 without convolutions.

    Of a logical graph those of the quantizers themselves, of a lowered one those behind its rescaled convolutions.
    """
    widest = 0.0
    ratios = {name_of(v): rows_and_index(v)[0] for n in model.graph if n.op_type == "Split" for v in n.outputs}
    for node in model.graph:
        reader = next(iter(node.outputs[0].uses()), None)
        if node.op_type != "Conv" or reader is None or reader.node.inputs[1] is None:
            continue
        step = float(rows_and_index(reader.node.inputs[1])[0].max())
        behind = next(iter(reader.node.outputs[0].uses())).node
        behind = next(iter(behind.outputs[0].uses())).node if behind.op_type == "Clip" else behind
        muls = [use.node for use in behind.outputs[0].uses() if use.node.op_type == "Mul"]
        back = [ratios[name_of(m.inputs[1])].max() for m in muls]
        widest = max(widest, step * max(back, default=1.0))
    return widest


@pytest.mark.parametrize("case", golden.cases(GOLDEN))
def test_golden(request: pytest.FixtureRequest, context: Context, case: str) -> None:
    update = bool(request.config.getoption("--update-golden"))
    program, after = lowered_golden(GOLDEN, case, lower_premul, update)
    check_constant(after.model)
    x = np.random.default_rng(3).standard_normal((2, 2, 4, 4)).astype(np.float32)
    # A convolution is rounded by half a step in either spelling; what reads two of them sees both.
    atol = 1e-4 + 1.01 * (output_step(program.model) + output_step(after.model)) / 2 * (
        3 if case == "conv_two_readers" else 1
    )
    for t in (4, 2, 0):
        want, got = (run(m, context, x, t) for m in (program.model, after.model))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol)


def test_there_is_a_golden_pair_for_each_form() -> None:
    convs = ("", "_scale_table", "_input_table", "_output_table", "_no_bias", "_timed_bias", "_timed_bias_and_scales")
    others = {"conv_narrow", "conv_two_readers", "matmul_add", "gemm", "attention", "attention_shared"}
    assert set(golden.cases(GOLDEN)) == {f"conv{rest}" for rest in convs} | others


def check_constant(model: ir.Model) -> None:
    """No scale and no zero point depends on the timestep, and all of the ratios are one lookup."""
    pairs = [n for n in model.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    assert all(is_constant(value) for node in pairs for value in node.inputs[1:])
    assert sum(name.startswith("ratios_table") for name in model.graph.initializers) <= 1


# One layer, and its twins that are one per cent off


def quantized_layer(body: str, context: Context, gain: float, bits: Bits = 8, bias: float = 1.0) -> Program:
    made = layer_program(body)
    value = made.graph.initializers.get("bias")
    if value is not None:
        value.const_value = ir.tensor(numpy_of(value) * np.float32(bias), name="bias")
    return pipeline.run_passes(made, passes((), gain, bits), context)


def check_same(program: Program, lowered: ir.Model, context: Context, *, slope: float = 0.004) -> None:
    """At every deployed timestep within half a step of either lowering, on average closer, and of one size.

    Matmuls have no step of their own: float rounding only, but for the few inputs that round to the other side.
    """
    assert program.plan is not None
    output = program.plan.of("epsilon") or program.plan.of("mixed")
    halves = (output_step(program.model) + output_step(lowered)) / 2
    for call, t in enumerate(program.deployment.timesteps):
        x = filling(program, call) * np.float32(0.5)
        want, got = (run(model, context, x, t) for model in (program.model, lowered))
        if halves and output is not None:  # a convolution; what lies outside of the plan's range is clipped there only
            row = program.plan.groups[call] if output.table else 0
            zero, scale = int(output.zero_point.reshape(-1)[row]), float(output.scale.reshape(-1)[row])
            fmt = output.format
            got = np.clip(got, (fmt.qmin - zero) * scale, (fmt.qmax - zero) * scale)
            np.testing.assert_allclose(got, want, rtol=0, atol=1.01 * halves)
            assert np.abs((got - want).mean(axis=(0, 2, 3))).max() < 0.15 * halves
            assert abs(np.sum(got * want) / np.sum(want * want) - 1) < slope
        else:
            worst = float(np.abs(want).max())
            assert np.mean(np.abs(got - want) > 1e-5 * worst) < 0.01
            np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * worst)


BODIES = {"conv": CONV, "timed": TIMED, "linear": LINEAR, "plain": PLAIN, "gemm": GEMM, "attention": ATTENTION}


@pytest.mark.parametrize(("body", "gain"), [*((body, -1000.0) for body in BODIES), ("conv", 1000.0), ("timed", 1000.0)])
def test_lowering_keeps_the_numbers(context: Context, body: str, gain: float) -> None:
    program = quantized_layer(BODIES[body], context, gain)
    lowered = lower_premul(program)
    check_constant(lowered)
    check_same(program, lowered, context)
    scale = {"conv": "conv_w_scale", "timed": "conv_w_scale", "attention": "_reference"}.get(body, "square_scale")
    plant(lowered, scale)
    with pytest.raises(AssertionError):
        check_same(program, lowered, context)


@pytest.mark.parametrize(
    ("body", "ending", "bias"),
    [
        *((body, "ratios_table", 1.0) for body in BODIES),
        ("conv", "bias_column", 50.0),
        ("timed", "bias_table", 50.0),
        ("linear", "bias", 1.0),
        ("gemm", "bias", 1.0),
    ],
)
def test_a_constant_that_is_one_percent_off_is_seen(context: Context, body: str, ending: str, bias: float) -> None:
    program = quantized_layer(BODIES[body], context, -1000.0, bias=bias)
    lowered = lower_premul(program)
    check_same(program, lowered, context)
    plant(lowered, ending)
    with pytest.raises(AssertionError):
        check_same(program, lowered, context)


def test_narrow_grids_stay_narrow(context: Context) -> None:
    program = quantized_layer(CONV, context, -1000.0, bits=4)
    lowered = lower_premul(program)
    assert counts(lowered.graph)["Clip"] == 3  # the timestep, and both activations
    check_same(program, lowered, context, slope=0.064)  # the steps are 16 times as wide


def test_what_the_plan_allows_is_not_clipped(context: Context) -> None:
    """The output's grid covers each group's range, rescaled by the input's ratio, wherever the bias lies."""
    program = quantized_layer(CONV, context, -1000.0, bias=20.0)
    lowered = lower_premul(program)
    x, y = (program.plan.of(name) for name in ("sample", "epsilon")) if program.plan else (None, None)
    assert x is not None and y is not None
    bias = numpy_of(program.graph.initializers["bias"])
    ratio = x.scale.max() / x.scale
    grid = {n.rpartition("output_")[2]: numpy_of(v) for n, v in lowered.graph.initializers.items() if "_output_" in n}
    low, high = ((end - float(grid["zero_point"])) * float(grid["scale"]) for end in (0, 255))
    wanted_low = ratio * ((0 - y.zero_point.astype(float)) * y.scale - bias.max())
    wanted_high = ratio * ((255 - y.zero_point.astype(float)) * y.scale - bias.min())
    half = 0.51 * float(grid["scale"])
    assert low <= wanted_low.min() + half and high >= wanted_high.max() - half
    assert low >= wanted_low.min() - half and high <= wanted_high.max() + half


@pytest.mark.parametrize("body", [CONV, LINEAR, GEMM, ATTENTION])
def test_without_tables_it_is_the_portable_spelling(context: Context, body: str) -> None:
    program = quantized_layer(body, context, 1000.0)
    assert golden.to_text(lower_premul(program)) == golden.to_text(lower_qdq(program.model))


# The whole network


def relative_error(want: Images, got: Images) -> float:
    return float(np.sqrt(np.mean((want - got) ** 2) / np.mean(want**2)))


def outputs(model: ir.Model, context: Context, timesteps: Sequence[float]) -> Images:
    x = np.random.default_rng(3).standard_normal((4, 1, 8, 8)).astype(np.float32)
    return np.stack([run(model, context, x, t) for t in timesteps])


def test_the_network_is_as_close_to_the_float_one_as_its_quantized_graph(context: Context) -> None:
    """Its convolutions round elsewhere, so that the two errors differ; they stay of one size."""
    program = pipeline.run_passes(tiny_program(), passes(), context)
    assert program.float_model is not None
    steps = program.deployment.timesteps
    exact, quantized = (outputs(model, context, steps) for model in (program.float_model, program.model))
    limit = 1.1 * relative_error(exact, quantized)

    def check(lowered: ir.Model) -> None:
        assert relative_error(exact, outputs(lowered, context, steps)) < limit

    check(lower_premul(program))
    planted = lower_premul(program)
    plant(planted, "ratios_table")
    with pytest.raises(AssertionError):
        check(planted)


def test_the_bundle_runs_in_plain_onnxruntime(hand: Compiled, tmp_path: Path) -> None:
    bundle = compile_model(hand.exported, tmp_path / "bundle", recipe="w8a8-steps", settings=SETTINGS, **SMALL)
    assert bundle.manifest.kernels.integer == INTEGER
    check_constant(ir.load(bundle.model_path))
    x = np.random.default_rng(1).standard_normal((2, 1, 8, 8)).astype(np.float32)
    sessions = [ort.InferenceSession(f, providers=["CPUExecutionProvider"]) for f in (hand.exported, bundle.model_path)]
    for t in bundle.deployment.timesteps:
        want, got = (s.run(None, {"x": x, "t": np.full(2, t, np.int64)})[0] for s in sessions)
        assert 0 < relative_error(want, got) < 0.05
        np.testing.assert_array_equal(got, bundle.denoiser(threads=2)(x, t))


def test_zero_points_that_move_are_refused(tiny: Program, context: Context) -> None:
    steps = [replace(p, zero_point="table") if isinstance(p, StepScales) else p for p in passes(gain=-1000.0)]
    with pytest.raises(RecipeError, match="premul has constant ones") as caught:
        pipeline.run_passes(tiny, steps, context)
    assert caught.value.hint == "give all rows one zero point: --set step_scales.zero_point=constant"


def test_the_recipe_runs_and_refuses_channels(context: Context) -> None:
    """w8a8-premul as it is; with scales per channel in front of insert_qdq it says what to leave out."""
    steps = RECIPES["w8a8-premul"].passes
    program = pipeline.run_passes(tiny_program(), steps, context)
    assert program.lowering == "premul" and program.plan is not None
    assert any(q.table for q in program.plan.quantizers.values())
    at = next(i for i, step in enumerate(steps) if isinstance(step, InsertQdq))
    wider = [replace(step, channels=True) if isinstance(step, Observe) else step for step in steps[:at]]
    with pytest.raises(RecipeError, match="need the integer lowering; premul has none") as caught:
        pipeline.run_passes(tiny_program(), [*wider, ChannelScales(gain=-1000.0), *steps[at:]], context)
    assert "w8a8-premul" in str(caught.value.hint)
