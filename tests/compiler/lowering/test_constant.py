"""lower_constant: golden pairs, the form that other engines read, the quantized graph's numbers, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mezzotint import Bundle, compile_model, mix_bundles
from mezzotint.cli.audit_tables import target_note
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError, RecipeError
from mezzotint.compiler.graph.nodes import DEFAULT_DOMAINS, consumers, counts, is_constant, is_op, numpy_of
from mezzotint.compiler.lowering.constant import lower_constant
from mezzotint.compiler.lowering.lower import lower
from mezzotint.compiler.lowering.qdq import dequantizer
from mezzotint.inspect.data import summary_section
from mezzotint.passes.channel_scales import ChannelScales
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.passes.step_scales import StepScales
from mezzotint.runtime.bundle.manifest import Manifest
from mezzotint.runtime.errors import BundleError, InputError
from mezzotint.runtime.signature import Images
from mezzotint.text.report import compile_rows, compile_summary, print_inspection
from tests.helpers import golden
from tests.helpers.layers import CONV, GEMM, LINEAR, PLAIN, TIMED, filling, layer_program, lowered_golden, plant
from tests.helpers.models import CONVS, INTEGER, SMALL, Compiled
from tests.helpers.tiny import SIGNATURE, tiny_program

GOLDEN = "lower_constant"
STEPS = RECIPES["w8a8-constant"].passes
Bits = Literal[4, 8]
ATTENTION = "turned = Transpose <perm = [0, 1, 3, 2]> (sample) epsilon = MatMul (sample, turned)"
BODIES = {"conv": CONV, "timed": TIMED, "linear": LINEAR, "plain": PLAIN, "gemm": GEMM, "attention": ATTENTION}


def passes(
    islands: tuple[str, ...] = ("first", "last"), gain: float = 0.2, bits: Bits = 8, symmetric: bool = False
) -> list[Pass]:
    """The recipe without rounding; at a `gain` of -1000 dB everything gets a table, at 1000 nothing."""
    steps: list[Pass] = []
    for step in STEPS:
        if isinstance(step, InsertQdq):
            step = replace(step, islands=islands)
        elif isinstance(step, StepScales):
            step = replace(step, gain=gain, decide="expected")
        elif isinstance(step, ChooseScales):
            symmetry: Literal["all", "products"] = "all" if symmetric else "products"
            step = replace(step, activation_bits=bits, weight_bits=bits, symmetric=symmetry)
        if step.name not in ("round_weights", "smooth_scales"):
            steps.append(step)
    return steps


def run(model: ir.Model, context: Context, x: Images, t: float) -> Images:
    with Executor(model, context.folder, threads=2, level="basic") as executor:
        return np.asarray(executor.call(SIGNATURE, x, t)["epsilon"], np.float32)


def check_form(model: ir.Model, *, symmetric: bool = False, products: bool = True) -> None:
    """The form that engines with constant scales read: see the docstring of compiler/lowering/constant.py."""
    assert all(node.domain in DEFAULT_DOMAINS for node in model.graph)
    assert not any(node.op_type.startswith(("QLinear", "MatMulInteger")) for node in model.graph)
    pairs = 0
    for node in model.graph:
        if is_op(node, "QuantizeLinear", "DequantizeLinear"):
            assert all(is_constant(value) and numpy_of(value).size for value in node.inputs[1:] if value is not None)
            assert not symmetric or not numpy_of(node.inputs[2]).any()  # type: ignore[arg-type]
        if is_op(node, "QuantizeLinear"):
            pairs += 1
            assert np.ndim(numpy_of(node.inputs[1])) == 0  # type: ignore[arg-type]
            assert node.outputs[0].dtype == ir.DataType.INT8 or not symmetric
            behind = consumers(node.outputs[0])
            assert behind and all(is_op(reader, "DequantizeLinear") for reader in behind)
            layers = [layer for pair in behind for layer in consumers(pair.outputs[0])]
            assert all(is_op(layer, "Conv", "Gemm", "MatMul") for layer in layers)  # no quantizer of an output
        elif is_op(node, "MatMul") and products:
            factors = [pair for pair in map(dequantizer, node.inputs) if pair and not is_constant(pair.inputs[0])]
            zeros = [numpy_of(pair.inputs[2]) for pair in factors]  # type: ignore[arg-type]
            assert len(factors) < 2 or not np.any(zeros)  # a product of two activations
        elif is_op(node, "DequantizeLinear"):
            source = node.inputs[0]
            assert is_constant(source) or (source is not None and is_op(source.producer(), "QuantizeLinear", "Cast"))
    assert pairs
    assert sum(name.startswith("ratios_table") for name in model.graph.initializers) <= 1


def check_equal(want: Images, got: Images) -> None:
    """Float rounding only, but for the few inputs that round to the other side."""
    worst = float(np.abs(want).max())
    assert np.mean(np.abs(got - want) > 1e-5 * worst) < 0.02
    np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * worst)


@pytest.mark.parametrize("case", golden.cases(GOLDEN))
def test_golden(request: pytest.FixtureRequest, context: Context, case: str) -> None:
    update = bool(request.config.getoption("--update-golden"))
    program, after = lowered_golden(GOLDEN, case, lower_constant, update)
    if case != "attention_shared":  # a reader in float behind the DequantizeLinear, as correct_softmax has it
        check_form(after.model, products=False)
    x = np.random.default_rng(3).standard_normal((2, 2, 4, 4)).astype(np.float32)
    for t in (4, 2, 0):
        want, got = (run(m, context, x, t) for m in (program.model, after.model))
        check_equal(want, got)


def test_there_is_a_golden_pair_for_each_form() -> None:
    convs = ("", "_table", "_no_bias", "_timed_bias", "_timed_bias_and_scales", "_narrow", "_two_readers")
    others = {"matmul_add", "gemm", "attention", "attention_shared"}
    assert set(golden.cases(GOLDEN)) == {f"conv{rest}" for rest in convs} | others


# One layer, and its twins that are one per cent off


def quantized_layer(body: str, context: Context, gain: float, bits: Bits = 8, symmetric: bool = False) -> Program:
    return pipeline.run_passes(layer_program(body), passes((), gain, bits, symmetric), context)


def check_same(program: Program, lowered: ir.Model, context: Context) -> None:
    for call, t in enumerate(program.deployment.timesteps):
        x = filling(program, call) * np.float32(0.5)
        check_equal(*(run(model, context, x, t) for model in (program.model, lowered)))


@pytest.mark.parametrize(("body", "gain"), [*((body, -1000.0) for body in BODIES), ("conv", 1000.0), ("timed", 1000.0)])
def test_lowering_keeps_the_numbers(context: Context, body: str, gain: float) -> None:
    program = quantized_layer(BODIES[body], context, gain)
    lowered = lower_constant(program)
    check_form(lowered)
    check_same(program, lowered, context)
    ratios = [name for name in lowered.graph.initializers if name.startswith("ratios_table")]
    assert bool(ratios) == (gain < 0)
    scale = {"conv": "conv_w_scale", "timed": "conv_w_scale", "attention": "_reference"}.get(body, "square_scale")
    for ending in (scale, *(["ratios_table"] if ratios else [])):
        planted = lower_constant(program)
        plant(planted, ending)
        with pytest.raises(AssertionError):
            check_same(program, planted, context)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, True)])
def test_narrow_and_symmetric_grids(context: Context, bits: Bits, symmetric: bool) -> None:
    """A Clip in float stands in front of Q where the grid is narrower than its storage, never between Q and DQ."""
    program = quantized_layer(CONV, context, -1000.0, bits, symmetric)
    lowered = lower_constant(program)
    check_form(lowered, symmetric=symmetric)
    assert counts(lowered.graph)["Clip"] == 1 + (bits < 8)  # one is that of the timestep
    check_same(program, lowered, context)


# The whole network


@pytest.mark.parametrize("gain", [-1000.0, 1000.0])
def test_the_network_computes_what_its_quantized_graph_does(context: Context, gain: float) -> None:
    program = pipeline.run_passes(tiny_program(), passes(gain=gain), context)
    assert program.plan is not None and program.plan.has_tables == (gain < 0)
    lowered = lower(program)
    check_form(lowered)
    x = np.random.default_rng(3).standard_normal((4, 1, 8, 8)).astype(np.float32)
    for t in program.deployment.timesteps:
        want, got = (run(model, context, x, t) for model in (program.model, lowered))
        assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 2e-3  # what rounds to the other side goes on


@pytest.fixture(scope="module", params=["openvino", "tensorrt"])
def bundle(request: pytest.FixtureRequest, hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = str(request.param)
    settings = {"insert_qdq.islands": ["first", "last"], "step_scales.decide": "expected"}
    folder = tmp_path_factory.mktemp(target) / "bundle"
    return compile_model(hand.exported, folder, target=target, settings=settings, **SMALL)


def test_a_bundle_has_the_form_and_runs_in_plain_onnxruntime(hand: Compiled, bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.recipe.name == "w8a8-constant"
    model = ir.load(bundle.model_path)
    check_form(model, symmetric=manifest.target == "tensorrt")
    assert set(model.opset_imports) <= set(DEFAULT_DOMAINS)
    x = np.random.default_rng(1).standard_normal((2, 1, 8, 8)).astype(np.float32)
    sessions = [ort.InferenceSession(f, providers=["CPUExecutionProvider"]) for f in (hand.exported, bundle.model_path)]
    for t in bundle.deployment.timesteps:
        want, got = (s.run(None, {"x": x, "t": np.full(2, t, np.int64)})[0] for s in sessions)
        assert 0 < np.sqrt(np.mean((want - got) ** 2) / np.mean(want**2)) < 0.05
        np.testing.assert_array_equal(got, bundle.denoiser(threads=2)(x, t))


def test_what_was_measured_in_another_engine_says_so(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernels of onnxruntime's CPU provider are not those of the target, nor are its times."""
    manifest, target = bundle.manifest, bundle.manifest.target
    note = f"in onnxruntime's CPU provider; the form is for {target}"
    rows = compile_rows(bundle, compile_summary(bundle))
    assert rows["target"] == target and rows["kernels"].endswith(note) and rows["speed"].endswith(note)
    assert dict(summary_section(bundle)["rows"])["kernels"] == rows["kernels"]
    print_inspection(bundle)
    assert note in " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    card = (bundle.path / "README.md").read_text()
    assert f"(target `{target}`)" in card and "onnxruntime's integer CPU kernels, 0 in float" not in card
    assert target_note(bundle.path) == f"the kernels are those {note} (--provider {target})"
    assert not target_note(bundle.path, target)
    floating = [layer.why for name, layer in manifest.kernels.layers.items() if name not in manifest.islands]
    assert floating and all(why.endswith(f"in the form for {target}") for why in floating)


def test_the_manifest_keeps_the_target(bundle: Bundle, hand: Compiled) -> None:
    data = bundle.manifest.to_json()
    assert data["target"] == bundle.manifest.target == Manifest.from_json(data, "here").target
    assert "target" not in hand.bundle.manifest.to_json() and hand.bundle.manifest.target == "onnxruntime"
    assert hand.bundle.manifest.kernels_text() == f"{INTEGER} integer, {CONVS - INTEGER} float"
    for wrong in ("openvin", 1, None):
        with pytest.raises(BundleError, match="target"):
            Manifest.from_json({**data, "target": wrong}, "here")


def test_a_mix_has_one_target(bundle: Bundle, hand: Compiled, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"differ in their target \(onnxruntime and {bundle.manifest.target}\)"):
        mix_bundles({"a": hand.bundle, "b": bundle}, tmp_path / "mix", reference=hand.exported)


# Refusals


def test_zero_points_that_move_are_refused(tiny: Program, context: Context) -> None:
    steps = [replace(p, zero_point="table") if isinstance(p, StepScales) else p for p in passes(gain=-1000.0)]
    with pytest.raises(RecipeError, match="constant has constant ones") as caught:
        pipeline.run_passes(tiny, steps, context)
    assert caught.value.hint == "give all rows one zero point: --set step_scales.zero_point=constant"


def test_scales_of_channels_are_refused(context: Context) -> None:
    steps = passes()
    at = next(i for i, step in enumerate(steps) if isinstance(step, InsertQdq))
    wider = [replace(step, channels="outputs") if isinstance(step, Observe) else step for step in steps[:at]]
    with pytest.raises(RecipeError, match="need the integer lowering; constant has none") as caught:
        pipeline.run_passes(tiny_program(), [*wider, ChannelScales(gain=-1000.0), *steps[at:]], context)
    assert "w8a8-constant" in str(caught.value.hint)


def test_integers_that_are_moved_are_refused(context: Context) -> None:
    """clean_qdq moves none with this lowering; the file of a pass that does would run in float."""
    program = pipeline.run_passes(layer_program(GEMM), [*passes(())[:-1]], context)
    moved = pipeline.run_passes(program, with_options(RECIPES["w8a8"], {}).passes[-1:], context)
    check_form(lower_constant(moved))
    as_qdq = replace(program, lowering="qdq")
    moved = pipeline.run_passes(as_qdq, with_options(RECIPES["w8a8"], {}).passes[-1:], context)
    with pytest.raises(PassError, match="a Reshape reads the integers of 'sample'"):
        lower_constant(moved)
