"""lower_integer: golden pairs, the same numbers as the quantized graph, and the kernels that onnxruntime runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mezzotint import Bundle, compile_model
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import counts, is_constant, name_of
from mezzotint.compiler.lowering.integer import lower_integer
from mezzotint.compiler.lowering.lower import lower
from mezzotint.passes.channel_scales import ChannelScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.lower_norms import LowerNorms
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.step_scales import StepScales
from mezzotint.runtime.errors import TimestepNotDeployed
from mezzotint.runtime.session import open_session
from mezzotint.runtime.signature import Images
from tests.helpers import golden
from tests.helpers.layers import CONV, GEMM, LINEAR, PLAIN, TIMED, filling, layer_program, lowered_golden, plant
from tests.helpers.models import INTEGER, SMALL, Compiled
from tests.helpers.tiny import ATTENTIONS, CONVS, LINEARS, SIGNATURE, tiny_program

GOLDEN = "lower_integer"
STEPS = RECIPES["w8a8-steps"].passes


def outputs(model: ir.Model, context: Context, shape: tuple[int, ...], timesteps: tuple[float, ...]) -> Images:
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    with Executor(model, context.folder, threads=2, level="basic") as executor:
        return np.stack([np.asarray(executor.call(SIGNATURE, x, t)["epsilon"], np.float32) for t in timesteps])


@pytest.mark.parametrize("case", golden.cases(GOLDEN))
def test_golden(request: pytest.FixtureRequest, context: Context, case: str) -> None:
    update = bool(request.config.getoption("--update-golden"))
    program, after = lowered_golden(GOLDEN, case, lower_integer, update)
    want, got = (outputs(m, context, (2, 2, 4, 4), (4, 2, 0)) for m in (program.model, after.model))
    # The biases are multiples of the accumulator's step, so that not even they are rounded.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_there_is_a_golden_pair_for_each_form() -> None:
    convs = {f"conv{rest}" for rest in ("", "_no_bias", "_scale_table", "_timed_bias")}
    others = {"conv_timed_bias_and_scales", "matmul_add", "matmul", "attention"}
    assert set(golden.cases(GOLDEN)) == convs | others | {"gemm_trans_b", "gemm_one_bias"}


def passes(islands: tuple[str, ...] = ("first", "last"), gain: float | None = None) -> list[Pass]:
    """Recipe w8a8-steps, with its own gains or another: at -1000 dB everything gets a table, at 1000 nothing."""
    steps: list[Pass] = []
    for step in STEPS:
        if isinstance(step, InsertQdq):
            steps.append(replace(step, islands=islands))
        elif isinstance(step, StepScales | ChannelScales) and gain is not None:
            steps.append(replace(step, gain=gain))
        else:
            steps.append(step)
    return steps


def quantized_layer(body: str, context: Context, tables: bool) -> Program:
    program = pipeline.run_passes(layer_program(body), passes((), -1000.0 if tables else 1000.0), context)
    assert program.plan is not None
    assert any(q.table for q in program.plan.quantizers.values()) == tables
    return program


def largest_step(program: Program) -> Images:
    """One step of the grid that the output lies on, the coarsest of its rows; else of the grid of the accumulator.

    A number, or `[C, 1, 1]` where each channel has a grid.
    """
    assert program.plan is not None
    producer = program.graph.outputs[0].producer()
    scales = {site.value: q.scale.max(axis=0) if q.table else q.scale for site, q in program.plan.quantizers.items()}
    if producer is not None and producer.op_type == "DequantizeLinear":
        step = scales.get("epsilon", scales.get("mixed"))
        assert step is not None
        return step[:, None, None] if step.ndim else step
    found = [float(s.max()) for name, s in scales.items() if name in ("sample", "flat", "square")]
    return np.asarray(np.prod(found), np.float32)


def check_same(program: Program, lowered: ir.Model, context: Context) -> None:
    """At every deployed timestep: within one step, and equal except for a few values that round to the other side."""
    step = largest_step(program)
    for call, t in enumerate(program.deployment.timesteps):
        x = filling(program, call)
        results = []
        for model in (program.model, lowered):
            with Executor(model, context.folder, threads=2, level="basic") as executor:
                results.append(executor.call(SIGNATURE, x, t)["epsilon"])
        want, got = results
        off = np.abs(got - want) / step
        assert off.max() <= 1.01
        assert np.mean(off > 0.1) < 0.01


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("body", [CONV, TIMED, LINEAR, PLAIN, GEMM], ids=["conv", "timed", "linear", "plain", "gemm"])
def test_lowering_keeps_the_numbers(context: Context, body: str, tables: bool) -> None:
    program = quantized_layer(body, context, tables)
    lowered = lower_integer(program)
    assert not set(counts(lowered.graph)) & {"Conv", "Gemm", "MatMul"}
    check_same(program, lowered, context)
    weights = "_factors_weights" if tables else "conv_w_scale"  # over the output's scales, or as they are
    plant(lowered, weights if "Conv" in body else "square_scale")
    with pytest.raises(AssertionError):
        check_same(program, lowered, context)


@pytest.mark.parametrize(
    ("body", "tables", "ending"),
    [
        (CONV, False, "_bias_int32"),
        (CONV, True, "_bias_table"),
        (TIMED, False, "_bias_table"),
        (TIMED, True, "_bias_table"),
        (CONV, True, "scales_table"),
        (TIMED, True, "scales_table"),
        (LINEAR, True, "scales_table"),
        (LINEAR, True, "bias"),
        (GEMM, False, "bias"),
    ],
)
def test_a_table_that_is_one_percent_off_is_seen(context: Context, body: str, tables: bool, ending: str) -> None:
    program = quantized_layer(body, context, tables)
    lowered = lower_integer(program)
    plant(lowered, ending)
    with pytest.raises(AssertionError):
        check_same(program, lowered, context)


def test_all_bias_tables_of_an_index_are_one_lookup(context: Context) -> None:
    program = pipeline.run_passes(tiny_program(), passes(), context)
    lowered = lower_integer(program)
    tables = [n for n, v in lowered.graph.initializers.items() if n.endswith("_bias_table")]
    indices = {name_of(n.inputs[1]) for n in lowered.graph if n.op_type == "Gather" and name_of(n.inputs[0]) in tables}
    assert 1 <= len(tables) == len(indices) <= 2


# The whole network

INTEGER_MATMULS = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm")
FLOAT_LAYERS = ("Conv", "FusedConv", "NchwcConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits")


def built(model: ir.Model, folder: Path) -> Counter[str]:
    """Return the operations of the graph that onnxruntime built."""
    file = folder / "optimized.onnx"
    open_session(store.write(model, folder, "lowered"), threads=2, optimized=file)
    return Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


@pytest.mark.parametrize("gain", [-1000.0, 0.2, 1000.0])
def test_all_layers_but_the_islands_are_integer_kernels(gain: float, context: Context) -> None:
    program = pipeline.run_passes(tiny_program(), passes(gain=gain), context)
    assert program.plan is not None
    assert set(program.plan.islands) == {"conv_in", "conv_out"}
    kernels = built(lower_integer(program), context.folder)
    assert kernels["QLinearConv"] == CONVS
    assert sum(kernels[name] for name in INTEGER_MATMULS) == LINEARS + ATTENTIONS
    assert sum(kernels[name] for name in FLOAT_LAYERS) == len(program.plan.islands)


def test_the_time_additions_are_gone(tiny: Program, context: Context) -> None:
    with_fold = pipeline.run_passes(tiny, passes(), context)
    without = pipeline.run_passes(tiny_program(), [p for p in passes() if p.name != "fold_time"], context)
    assert counts(with_fold.graph)["Add"] == counts(without.graph)["Add"] - 2
    biases = {n.name: n.inputs[8] for n in lower_integer(with_fold).graph if n.op_type == "QLinearConv"}
    for name in ("b1_conv1", "b2_conv1"):
        bias = biases[name]
        assert bias is not None and bias.producer() is not None, f"the bias of {name} does not know the timestep"


@pytest.mark.parametrize("gain", [-1000.0, 1000.0])
def test_a_gathered_bias_comes_with_a_gathered_zero_point(gain: float, context: Context) -> None:
    """Older versions of onnxruntime would drop the bias (tests/compiler/audit/test_versions.py runs one)."""
    lowered = lower_integer(pipeline.run_passes(tiny_program(), passes(gain=gain), context))
    convs = [n for n in lowered.graph if n.op_type == "QLinearConv"]
    gathered = [n for n in convs if not is_constant(n.inputs[8])]
    assert gathered
    assert not any(is_constant(n.inputs[2]) for n in gathered)


def relative_error(want: Images, got: Images) -> float:
    return float(np.sqrt(np.mean((want - got) ** 2) / np.mean(want**2)))


def test_the_network_computes_what_its_quantized_graph_computes(context: Context) -> None:
    """Values on the edge of two steps fall to either side, so a deep network agrees to a part of its own noise."""
    program = pipeline.run_passes(tiny_program(), passes(), context)
    exact, quantized = (
        outputs(model, context, (4, 1, 8, 8), program.deployment.timesteps)
        for model in (program.float_model, program.model)
        if model is not None
    )
    limit = 0.33 * relative_error(exact, quantized)

    def check(lowered: ir.Model) -> None:
        got = outputs(lowered, context, (4, 1, 8, 8), program.deployment.timesteps)
        assert relative_error(quantized, got) < limit

    check(lower(program))
    for ending in ("scales_table", "_bias_table"):
        planted = lower(program)
        plant(planted, ending)
        with pytest.raises(AssertionError):
            check(planted)


def test_without_islands_nothing_stays_in_float(context: Context) -> None:
    """The sample itself has a table then, and is quantized behind the lookup."""
    kernels = built(lower_integer(pipeline.run_passes(tiny_program(), passes(islands=()), context)), context.folder)
    assert kernels["QLinearConv"] == CONVS + 2
    assert sum(kernels[name] for name in FLOAT_LAYERS) == 0


def test_norms_stay_whole_where_the_recipe_leaves_them(context: Context) -> None:
    steps = [p for p in passes() if not isinstance(p, LowerNorms)]
    kernels = built(lower_integer(pipeline.run_passes(tiny_program(), steps, context)), context.folder)
    assert kernels["QLinearConv"] == CONVS


# The bundle

# Four convolutions: but for the settings the recipe would leave all of them in float. Extremes of channels want more
# than two samples, as the inputs below are no trajectory.
BUNDLE: dict[str, Any] = {
    **SMALL,
    "recipe": "w8a8-steps",
    "settings": {"insert_qdq.islands": ["first", "last"]},
    "calibration_samples": 8,
}


@pytest.fixture(scope="module")
def steps_bundle(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("steps")
    return compile_model(hand.exported, folder / "bundle", **BUNDLE)


def plain(bundle: Bundle, t: float) -> Images:
    """The model file runs in onnxruntime without Mezzotint."""
    session = ort.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, 1, 8, 8)).astype(np.float32)
    (y,) = session.run(None, {"x": x, "t": np.full(2, t, np.int64)})
    return np.asarray(y, np.float32)


def test_the_bundle_runs_in_plain_onnxruntime(steps_bundle: Bundle, hand: Compiled) -> None:
    session = ort.InferenceSession(hand.exported, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, 1, 8, 8)).astype(np.float32)
    for t in steps_bundle.deployment.timesteps:
        want = session.run(None, {"x": x, "t": np.full(2, t, np.int64)})[0]
        got = plain(steps_bundle, t)
        np.testing.assert_array_equal(got, steps_bundle.denoiser(threads=2)(x, t))
        assert 0 < relative_error(want, got) < 0.05
    kernels = steps_bundle.manifest.kernels
    assert kernels.integer == INTEGER, kernels
    quantizers = steps_bundle.manifest.quantizers
    assert any(q.rows > 1 for q in quantizers)


def test_a_timestep_outside_of_the_tables(steps_bundle: Bundle) -> None:
    """onnxruntime alone takes the nearest row; the runtime refuses."""
    deployed = steps_bundle.deployment.timesteps
    t = deployed[1]
    np.testing.assert_array_equal(plain(steps_bundle, t), plain(steps_bundle, t + 1))
    denoiser = steps_bundle.denoiser(threads=2)
    x = np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(TimestepNotDeployed):
        denoiser(x, t + 1)


def contents(folder: Path) -> dict[str, Any]:
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.suffix in (".onnx", ".data", ".safetensors")
    }


def test_the_same_compile_twice_gives_the_same_bytes(steps_bundle: Bundle, hand: Compiled, tmp_path: Path) -> None:
    again = compile_model(hand.exported, tmp_path / "again", **BUNDLE)
    assert contents(again.path) == contents(steps_bundle.path)
    assert again.manifest.digest == steps_bundle.manifest.digest != hand.bundle.manifest.digest


@pytest.mark.parametrize("left_out", ["fold_time", "step_scales"])
def test_the_portable_spelling_refuses_what_depends_on_the_timestep(
    tiny: Program, context: Context, left_out: str
) -> None:
    steps = [p for p in RECIPES["w8a8-steps"].passes if p.name != left_out]
    portable = [replace(p, lowering="qdq") if isinstance(p, InsertQdq) else p for p in steps]
    with pytest.raises(RecipeError, match="need the integer or the constant lowering"):
        pipeline.run_passes(tiny, portable, context)
