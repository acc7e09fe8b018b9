"""smooth_scales: golden pairs, exactness on whole models, and that the search finds what was planted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass, Recipe
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import NotExact, RecipeError, StatsError
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import Layer, layers
from mezzotint.compiler.rescaling import scaling
from mezzotint.compiler.rescaling.scaling import Factors
from mezzotint.compiler.rescaling.smoothing import Evidence, GroupedWeight, Widths
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import make_pass, with_options
from mezzotint.passes.recipes.parts import FAST
from mezzotint.passes.smooth_scales import SmoothScales
from mezzotint.runtime.sampling.deployment import Deployment
from tests.conftest import Check
from tests.helpers import golden
from tests.helpers.channels import with_channels
from tests.helpers.models import Compiled, prompts
from tests.helpers.tiny import program_of, short_schedule, tiny_program

PLAIN: dict[str, Any] = {"islands": (), "power_of_two": True}
INPUTS = Observe(groups=0, channels="inputs")


def test_factors_move_into_a_norm(check_golden: Check) -> None:
    step = SmoothScales(alphas=1.0, weight_bits=8, activation_bits=4, **PLAIN)
    after = check_golden(step, "norm", shape=(4, 4, 4), prepare=with_channels("normed", -1, (1, 1, 16, 2)))
    assert after.stats is not None  # the pipeline does not drop them; their digest is that of another graph
    assert after.history[-1].note.startswith("1 of 1 values scaled (1 norm), ")


def test_factors_in_front_of_a_convolution_stay_at_run_time(check_golden: Check) -> None:
    step = SmoothScales(alphas=1.0, activation_bits=4, run_time=True, run_time_gain=1.0, **PLAIN)
    prepare = with_channels("read", 1, (1, 16))
    after = check_golden(step, "silu", shape=(2, 4, 4), prepare=prepare)
    assert "1 run_time" in after.history[-1].note and "over 100% of what layers read" in after.history[-1].note


def silu(context: Context, **options: Any) -> str:
    """The note about the model of the golden pair `silu`, whose graph must stay as it is."""
    model = infer_shapes(golden.before("smooth_scales", "silu"))
    program = with_channels("read", 1, (1, 16))(program_of(model, shape=(2, 4, 4)))
    after = pipeline.run_passes(program, [SmoothScales(**{**PLAIN, "activation_bits": 4, **options})], context)
    assert golden.to_text(after.model) == golden.to_text(program.model)
    note = after.history[-1].note
    assert ("no rescaling is exact" in note) == (set(after.refused) == {"read"})
    return note


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({}, "0 of 1 values scaled; left alone: 1 no rescaling is exact"),
        ({"run_time": True, "run_time_gain": 60.0}, "0 of 1 values scaled; left alone: 1 gains too little"),
        ({"run_time": True, "islands": ("conv",)}, "0 of 1 values scaled; left alone: 1 float layers"),
    ],
)
def test_what_is_left_alone_is_counted(context: Context, options: dict[str, Any], note: str) -> None:
    assert silu(context, **options) == note


def test_a_value_measured_along_another_axis(context: Context) -> None:
    model = infer_shapes(_norm())
    program = with_channels("normed", 1, (1, 1, 16, 2))(program_of(model, shape=(4, 4, 4)))
    after = pipeline.run_passes(program, [SmoothScales(**PLAIN)], context)
    assert after.history[-1].note.endswith("left alone: 1 its channels were measured along another axis")
    assert after.refused == {"normed": "its channels were measured along another axis"}


def test_a_silent_value(context: Context) -> None:
    program = with_channels("normed", -1, (0, 0, 0, 0))(program_of(infer_shapes(_norm()), shape=(4, 4, 4)))
    after = pipeline.run_passes(program, [SmoothScales(**PLAIN)], context)
    assert after.history[-1].note.endswith("left alone: 1 gains too little")


def _norm() -> ir.Model:
    return golden.before("smooth_scales", "norm")


def test_statistics_are_demanded(context: Context) -> None:
    program = pipeline.run_passes(tiny_program(), [Normalize()], context)
    measured = pipeline.run_passes(program, [Observe()], context)
    with pytest.raises(StatsError, match="no channel that a layer reads") as caught:
        pipeline.run_passes(measured, [SmoothScales()], context)
    assert caught.value.hint == "measure them: --set observe.channels=inputs"
    other = pipeline.run_passes(tiny_program(channels=2), [Normalize(), INPUTS], context)
    with pytest.raises(StatsError, match="another graph"):
        pipeline.run_passes(replace(program, stats=other.stats), [SmoothScales()], context)


@pytest.mark.parametrize("alphas", [(), (0.5, 1.2), -0.1])
def test_alphas_are_checked(alphas: Any) -> None:
    with pytest.raises(RecipeError, match=r"smooth_scales\.alphas"):
        SmoothScales(alphas=alphas)


def test_options_of_a_recipe_file() -> None:
    assert make_pass("smooth_scales", {"alphas": 0.5, "run_time": True}) == SmoothScales(alphas=0.5, run_time=True)
    assert make_pass("smooth_scales", {"alphas": [0.5, 1]}) == SmoothScales(alphas=(0.5, 1.0))
    assert make_pass("smooth_scales", SmoothScales().options()) == SmoothScales()
    with pytest.raises(RecipeError, match="needs 'stats'"):
        Recipe("r", "", (*FAST, INPUTS, SmoothScales(), ChooseScales()))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("aggregate", ["max", "mean"])
def test_the_factors_are_those_of_the_papers(aggregate: Any, power_of_two: bool) -> None:
    """s_k = amax_k^alpha / wmax_k^(1 - alpha), up to one number for all channels."""
    rng = np.random.default_rng(2)
    extremes = np.stack([-rng.uniform(1, 9, (3, 5)), rng.uniform(1, 9, (3, 5))], axis=1)
    weights = [_matmul(rng.standard_normal((5, 3)).astype(np.float32)) for _ in range(2)]
    evidence = Evidence(extremes, np.ones(5), weights, Widths(8, 8))
    found = SmoothScales(alphas=(0.0, 0.3, 1.0), aggregate=aggregate, power_of_two=power_of_two).candidates(
        evidence, weights
    )
    assert list(found) == ["0", "0.3", "1"]
    for alpha, got in zip((0.0, 0.3, 1.0), found.values(), strict=True):
        want = []
        for k in range(5):
            calls = [max(-low[k], high[k]) for low, high in extremes]
            amax = max(calls) if aggregate == "max" else sum(calls) / len(calls)
            wmax = max(abs(float(v)) for w in weights for v in w.array[0, :, k, 0])
            want.append(amax**alpha / wmax ** (1 - alpha))
        ratios = np.log2(got / np.array(want))
        if power_of_two:
            assert np.all(np.frexp(got)[0] == 0.5) and np.ptp(ratios) <= 1.0
        else:
            np.testing.assert_allclose(ratios, ratios[0], atol=1e-5)
            with pytest.raises(AssertionError):
                np.testing.assert_allclose(np.log2(got * [1.01, 1, 1, 1, 1] / np.array(want)), ratios[0], atol=1e-5)


def _matmul(array: Any) -> GroupedWeight:
    size = ",".join(str(n) for n in array.shape)
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[3,{len(array)}] x) => (float y) <float[{size}] w> {{ y = MatMul (x, w) }}""")
    value = model.graph[0].inputs[1]
    assert value is not None
    value.const_value = ir.tensor(array, name="w")
    model.graph.register_initializer(value)
    (layer,) = layers(model.graph)
    return GroupedWeight(layer)


def give(model: ir.Model, arrays: Mapping[str, Any]) -> None:
    """Values for initializers that the text only declares."""
    named = {name_of(v): v for node in model.graph for v in node.inputs if v is not None}
    for name, array in arrays.items():
        named[name].const_value = ir.tensor(np.asarray(array, np.float32), name=name)
        model.graph.register_initializer(named[name])


@pytest.fixture
def outliers(context: Context) -> Program:
    """Tokens behind a norm whose gain has planted outliers, read by two layers; observed."""
    rng = np.random.default_rng(3)
    channels = 32
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,2,4,{channels}] sample, int64[batch] timestep) => (float[batch,2,4,{channels}] epsilon)
    <float[{channels}] gain, float[{channels}] shift,
     float[{channels},{channels}] a_w, float[{channels},{channels}] b_w>
    {{ normed = LayerNormalization <axis = -1> (sample, gain, shift) [a] a = MatMul (normed, a_w)
       [b] b = MatMul (normed, b_w) epsilon = Add (a, b) }}""")
    gain = np.where(np.arange(channels) % 8 == 0, 30.0, 1.0)
    arrays = {"gain": gain, "shift": np.zeros(channels)}
    arrays |= {name: rng.standard_normal((channels, channels)) / gain[:, None] ** 0.5 for name in ("a_w", "b_w")}
    give(model, arrays)
    program = program_of(infer_shapes(model), shape=(2, 4, channels))
    return pipeline.run_passes(program, [Normalize(), INPUTS], context)


def quantized_noise(program: Program, context: Context, weight_bits: Any, activation_bits: Any) -> float:
    """Of epsilon, relative to its power, with both layers really quantized."""
    widths = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    steps = [Observe(), ChooseScales(activations="minmax", **widths), InsertQdq(islands=())]
    after = pipeline.run_passes(program, steps, context)
    assert after.float_model is not None
    x = np.random.default_rng(8).standard_normal((8, *program.shape)).astype(np.float32)
    with Executor(after.model, context.folder, threads=1) as rough:
        got = rough.call(program.signature, x, 500)["epsilon"]
    with Executor(after.float_model, context.folder, threads=1) as exact:
        want = exact.call(program.signature, x, 500)["epsilon"]
    return float(10 * np.log10(((got - want) ** 2).sum() / (want**2).sum()))


def test_logarithmic_factors_bring_loud_channels_down_to_their_logarithm() -> None:
    """FPTQ: x / s has the peaks log2(2 + amax / mean), up to one number for all channels."""
    peaks = np.array([0.5, 1.0, 2.0, 100.0])
    weights = [_matmul(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32))]
    evidence = Evidence(np.stack([-peaks, peaks])[None], peaks**2 / 3, weights, Widths(4, 8))
    left = peaks / SmoothScales(form="log").candidates(evidence, weights)["1"]
    wanted = np.log2(2 + peaks / peaks.mean())
    np.testing.assert_allclose(left / left[0], wanted / wanted[0])
    rounded = SmoothScales(form="log", power_of_two=True).candidates(evidence, weights)["1"]
    assert np.all(np.frexp(rounded)[0] == 0.5)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 4), (4, 8), (4, 4), (3, 6)])
def test_the_search_finds_a_good_alpha(
    outliers: Program, context: Context, weight_bits: Any, activation_bits: Any
) -> None:
    """Within half a decibel of the best alpha of all, each of them tried for real."""
    widths = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    tried = {}
    for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        step = SmoothScales(alphas=alpha, gain=-100.0, islands=(), **widths)
        tried[alpha] = quantized_noise(pipeline.run_passes(outliers, [step], context), context, **widths)
    none = quantized_noise(outliers, context, **widths)
    found = pipeline.run_passes(outliers, [SmoothScales(islands=(), **widths)], context)
    assert found.history[-1].note.startswith("1 of 1 values scaled (1 norm), ")
    noise = quantized_noise(found, context, **widths)
    assert noise < min(tried.values()) + 0.5 and noise < none - 1.0
    assert max(tried.values()) > min(tried.values()) + 1.0  # it matters which


def test_equal_channels_are_left_alone(context: Context) -> None:
    """All factors equal to 1 are a candidate: where no others gain, the graph stays."""
    program = with_channels("normed", -1, (4, 4, 4, 4))(program_of(infer_shapes(_norm()), shape=(4, 4, 4)))
    after = pipeline.run_passes(program, [SmoothScales(islands=(), gain=0.5, activation_bits=4)], context)
    assert golden.to_text(after.model) == golden.to_text(program.model)
    assert after.history[-1].note == "0 of 1 values scaled; left alone: 1 gains too little"


def contents(program: Program) -> tuple[str, dict[str, bytes]]:
    """The text of a graph without the places of its stored weights, and the bytes of its constants."""
    constants = {name: value.const_value for name, value in program.graph.initializers.items()}
    found = {name: tensor.tobytes() for name, tensor in constants.items() if tensor is not None}
    return re.sub(r'"offset": "\d+"', "", golden.to_text(program.model)), found


def test_the_tiny_denoiser_stays_exact(context: Context) -> None:
    """Every value that has sites or a Mul, whatever it gains; run by the pipeline against the graph before it."""
    program = pipeline.run_passes(tiny_program(), [*FAST, INPUTS], context)
    step = SmoothScales(gain=-100.0, run_time=True, run_time_gain=-100.0, islands=())
    after = pipeline.run_passes(program, [step], context)
    assert after.history[-1].note.startswith("12 of 12 values scaled (1 linear, 10 run_time, 1 value), ")
    again = pipeline.run_passes(program, [step], context)
    assert contents(after) == contents(again)


def test_a_factor_that_is_one_percent_off_is_refused(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pipeline.run_passes(tiny_program(), [*FAST, INPUTS], context)
    true = scaling.multiplied_weight

    def off(layer: Layer, factors: Factors) -> Any:
        return true(layer, factors) * np.float32(1.01)

    monkeypatch.setattr(scaling, "multiplied_weight", off)
    with pytest.raises(NotExact):
        pipeline.run_passes(program, [SmoothScales(gain=-100.0, run_time=True, run_time_gain=-100.0)], context)


def test_a_unet_with_conditions_stays_exact(conditional: Compiled, context: Context) -> None:
    """Norms, values of attention and gated values of a UNet2DConditionModel; the pipeline compares the numbers."""
    schedule = short_schedule()
    given = replace(context, samples=2, conditions={"encoder_hidden_states": prompts(2)})
    deployment = Deployment.of(schedule, "ddim", 2)
    program = import_onnx(conditional.exported, context.folder, schedule=schedule, deployment=deployment, size=(8, 8))
    after = pipeline.run_passes(program, [*FAST, INPUTS, SmoothScales(gain=-100.0)], given)
    note = after.history[-1].note
    assert all(f"{kind}" in note for kind in ("gated", "norm", "value")), note
    assert "no rescaling is exact" in note
    assert any("SiLU" in reason for reason in after.refused.values())


ADALN = """
    number = Cast <to = 1> (timestep) column = Unsqueeze (number, axis) angles = Mul (column, frequencies)
    waves = Cos (angles) [time] made = Gemm <transB = 1> (waves, time_w, time_b)
    scale_row, shift_row = Split <axis = 1, num_outputs = 2> (made)
    scale = Unsqueeze (scale_row, axes) shift = Unsqueeze (shift_row, axes)
    normed = LayerNormalization <axis = -1> (sample, ones) larger = Add (scale, one)
    scaled = Mul (normed, larger) read = Add (scaled, shift)
    [a] a = MatMul (read, a_w) [b] b = MatMul (read, b_w) epsilon = Add (a, b)"""


@pytest.mark.parametrize("first", [(Normalize(),), FAST])
def test_adaptive_norms_stay_exact(context: Context, first: tuple[Pass, ...]) -> None:
    """As in a DiT: the factors go into the layer that makes scale and shift, or into the tables of what it made."""
    shapes = {"frequencies": (1, 4), "time_w": (16, 4), "time_b": (16,), "a_w": (8, 8), "b_w": (8, 8)}
    declared = ", ".join(f"float[{','.join(str(n) for n in shape)}] {name}" for name, shape in shapes.items())
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,2,4,8] sample, int64[batch] timestep) => (float[batch,2,4,8] epsilon)
    <int64[1] axis = {{1}}, int64[2] axes = {{1, 2}}, float one = {{1}}, float[8] ones = {{1, 1, 1, 1, 1, 1, 1, 1}},
     {declared}> {{ {ADALN} }}""")
    rng = np.random.default_rng(4)
    give(model, {name: rng.standard_normal(shape) for name, shape in shapes.items()})
    program = pipeline.run_passes(program_of(infer_shapes(model), shape=(2, 4, 8)), [*first, INPUTS], context)
    after = pipeline.run_passes(
        program, [SmoothScales(gain=-100.0, islands=("time*",) if len(first) == 1 else ())], context
    )
    assert "(1 adaln)" in after.history[-1].note


def test_a_whole_recipe(context: Context) -> None:
    """Observed, scaled, observed again, and through to integer kernels with tables."""
    islands = ("first", "last")
    scaled = SmoothScales(weight_bits=4, gain=0.0, run_time=True, run_time_gain=0.0, islands=islands)
    steps = with_options(RECIPES["w8a8-steps"], {"choose_scales.weight_bits": 4, "insert_qdq.islands": islands})
    recipe = Recipe("r", "", (*FAST, INPUTS, scaled, *steps.passes[len(FAST) :]))
    program = pipeline.run_passes(tiny_program(), recipe.passes, context)
    assert any("run_time" in record.note for record in program.history if record.name == "smooth_scales")
    x = np.random.default_rng(0).standard_normal((4, *program.shape)).astype(np.float32)
    assert program.float_model is not None
    # The spelling that onnxruntime fuses is written by write_bundle; here the logical graph runs as it stands.
    with Executor(program.model, context.folder, threads=2, level="basic") as rough:
        got = rough.call(program.signature, x, program.deployment.timesteps[1])["epsilon"]
    with Executor(program.float_model, context.folder, threads=2) as exact:
        want = exact.call(program.signature, x, program.deployment.timesteps[1])["epsilon"]
    assert 10 * np.log10((want**2).sum() / ((got - want) ** 2).sum()) > 10
