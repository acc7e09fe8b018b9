"""split_shortcuts: golden pairs, the numbers, the kernels that come out, and what the forms gain."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from mezzotint import compile_model
from mezzotint.compiler.audit.kernels import FLOAT_KERNELS, INTEGER_KERNELS
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import INT8, UINT8
from mezzotint.compiler.core.islands import Islands
from mezzotint.compiler.core.pipeline import Context, Pass, Recipe
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.graph import nodes as graphs
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import counts, is_op, name_of, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.shortcuts.segment_errors import Form, FormCosts, measure_segments
from mezzotint.compiler.shortcuts.segments import find_joined
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import make_pass, with_options
from mezzotint.passes.recipes.parts import EXACT
from mezzotint.passes.split_shortcuts import SplitShortcuts
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.session import running_version
from mezzotint.runtime.signature import Images
from tests.conftest import Check
from tests.helpers.models import SCHEDULER, SMALL, Compiled, prompts
from tests.helpers.tiny import ATTENTIONS, CONVS, LINEARS, program_of, tiny_model

LAYERS = ("conv", "timed_bias", "three_parts", "linear", "gemm", "moved")
WHOLE = SplitShortcuts(islands=())


@pytest.mark.parametrize("case", LAYERS)
def test_golden(check_golden: Check, case: str) -> None:
    after = check_golden(WHOLE, case)
    assert after.history[0].note == "1 of 1 layers behind a concatenation taken apart"


def test_golden_left_alone(check_golden: Check) -> None:
    after = check_golden(WHOLE, "left_alone")
    note = after.history[0].note
    assert note.startswith("0 of 4 layers behind a concatenation taken apart; 4 left (")
    for why in (
        "grouped: its channels are in groups",
        "tall: joined along another axis",
        "noisy: a part is constant",
        "rearranged: its input is rearranged on the way",
    ):
        assert why in note


def test_golden_chained(check_golden: Check) -> None:
    """What one layer that is taken apart computed is a part of the next."""
    after = check_golden(WHOLE, "chained")
    assert after.history[0].note == "2 of 2 layers behind a concatenation taken apart"


def test_golden_powers(check_golden: Check) -> None:
    after = check_golden(SplitShortcuts(method="powers", islands=()), "powers")
    note = after.history[0].note
    assert note == "0 of 1 layers behind a concatenation taken apart; 1 divided (shortcut by 1 to 16, by channel)"


# The numbers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def normal(tiny: Program, context: Context) -> Program:
    return pipeline.run_passes(tiny, [Normalize(), FreezeTime()], context)


def outputs(
    model: ir.Model, program: Program, context: Context, x: Images | None = None, **conditions: npt.NDArray[Any]
) -> Images:
    x = initial_noise(1, (2, *program.shape)) if x is None else x
    with Executor(model, context.folder, threads=2) as executor:
        return np.stack(
            [
                executor.call(program.signature, x, t, conditions)[program.signature.output]
                for t in program.deployment.timesteps
            ]
        )


def check_same(want: Images, got: Images) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(np.abs(want).max()))


@pytest.mark.parametrize(("method", "planted"), [("layers", "shortcut_w_part_1"), ("factors", "shortcut_w_scaled")])
def test_the_numbers_stay(
    normal: Program, context: Context, monkeypatch: pytest.MonkeyPatch, method: Any, planted: str
) -> None:
    monkeypatch.setattr(FormCosts, "best_factors", lambda self, step: (1.0, 2.0**-3))
    after = pipeline.run_passes(normal, [SplitShortcuts(method=method)], context)
    want = outputs(normal.model, normal, context)
    check_same(want, outputs(after.model, normal, context))
    weight = after.graph.initializers[planted]
    weight.const_value = ir.tensor(numpy_of(weight) * np.float32(1.01), name=planted)
    with pytest.raises(AssertionError):
        check_same(want, outputs(after.model, normal, context))


def test_layers_of_the_time_branch_are_left_to_freeze_time(tiny: Program, context: Context) -> None:
    """The first time layer reads sines and cosines that are joined, too."""
    after = pipeline.run_passes(tiny, [Normalize(), SplitShortcuts()], context)
    assert after.history[1].note == "1 of 1 layers behind a concatenation taken apart"
    assert {"shortcut_part_0", "shortcut_part_1", "time_1"} <= {layer.name for layer in layers(after.graph)}


def test_every_shortcut_of_a_conditional_unet_is_taken_apart(conditional: Compiled, context: Context) -> None:
    schedule = Schedule.named(SCHEDULER)
    deployment = Deployment.of(schedule, "ddim", 3)
    program = import_onnx(conditional.exported, context.folder, schedule=schedule, deployment=deployment, size=(8, 8))
    given = {"encoder_hidden_states": prompts(2)}
    context = replace(context, conditions=given)
    before = pipeline.run_passes(program, [Normalize(), FreezeTime()], context)
    shortcuts = [n for n in before.graph if is_op(n, "Concat") and len(n.outputs[0].shape or ()) == 4]
    after = pipeline.run_passes(before, [SplitShortcuts()], context)
    count = len(shortcuts)
    assert count == 4
    assert after.history[-1].note == f"{count} of {count} layers behind a concatenation taken apart"
    assert counts(after.graph)["Conv"] == counts(before.graph)["Conv"] + count
    check_same(outputs(before.model, before, context, **given), outputs(after.model, before, context, **given))


def test_a_model_without_concatenations_says_so(hand: Compiled, context: Context) -> None:
    schedule = Schedule.named(SCHEDULER)
    deployment = Deployment.of(schedule, "ddim", 3)
    program = import_onnx(hand.exported, context.folder, schedule=schedule, deployment=deployment)
    after = pipeline.run_passes(program, [Normalize(), FreezeTime(), SplitShortcuts(method="best")], context)
    assert after.history[-1].note == "no layer reads a concatenation"


# What it gains ---------------------------------------------------------------------------------------------------

CONV = """joined = Concat <axis = 1> (quiet, loud) [shortcut] epsilon = Conv (joined, weight)"""
LINEAR = """joined = Concat <axis = 1> (quiet, loud) tokens = Transpose <perm = [0, 2, 3, 1]> (joined)
    [shortcut] product = MatMul (tokens, weight) epsilon = Transpose <perm = [0, 3, 1, 2]> (product)"""


def bimodal(body: str, loudness: float) -> Program:
    """A layer over two parts of 4 channels, one much louder; both matter equally to the output."""
    weight = np.random.default_rng(5).standard_normal((4, 8)).astype(np.float32)
    weight[:, 4:] /= loudness
    conv = "Conv" in body
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,4,8,8] sample, int64[batch] timestep) => (float[batch,4,8,8] epsilon)
    <float loudness = {{{loudness}}}, float[{"4,8,1,1" if conv else "8,4"}] weight>
    {{ quiet = Sin (sample) twice = Add (sample, sample) other = Sin (twice) loud = Mul (other, loudness) {body} }}""")
    value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == "weight")
    value.const_value = ir.tensor(weight.reshape(4, 8, 1, 1) if conv else weight.T.copy(), name="weight")
    model.graph.register_initializer(value)
    return program_of(infer_shapes(model), shape=(4, 8, 8), steps=1)


def sqnr(program: Program, step: SplitShortcuts | None, context: Context) -> float:
    """Of what comes out behind quantization, in dB, on the noise that it was calibrated on."""
    steps: list[Pass] = [Normalize(), *([step] if step else []), Observe(), ChooseScales(), InsertQdq(islands=())]
    after = pipeline.run_passes(program, steps, context)
    x = initial_noise(context.seed, (context.samples, *program.shape))
    want, got = (outputs(m, program, context, x).astype(np.float64) for m in (program.model, after.model))
    return float(10 * np.log10(np.square(want).sum() / np.square(got - want).sum()))


@pytest.mark.parametrize(("body", "least"), [(CONV, 20.0), (LINEAR, 25.0)])
@pytest.mark.parametrize("method", ["layers", "powers", "factors"])
def test_a_bimodal_concatenation_gains(context: Context, body: str, least: float, method: Any) -> None:
    """A convolution rounds what it computes to 8 bits, which bounds the gain."""
    program = bimodal(body, 50.0)
    whole = sqnr(program, None, context)
    assert sqnr(program, SplitShortcuts(method=method, islands=()), context) > whole + least


def chosen(program: Program, context: Context, **options: Any) -> str:
    step = SplitShortcuts(method="best", islands=(), **options)
    return pipeline.run_passes(program, [Normalize(), step], context).history[-1].note


@pytest.mark.parametrize("body", [CONV, LINEAR])
def test_best_leaves_alone_what_does_not_pay(context: Context, body: str) -> None:
    note = chosen(bimodal(body, 1.0), context, gain=2.0)
    assert note == "0 of 1 layers behind a concatenation taken apart; 1 whole, as nothing pays"
    assert chosen(bimodal(body, 50.0), context, gain=60.0) == note


def test_best_takes_a_dearer_form_where_it_pays(context: Context) -> None:
    """A Mul moves less than a second convolution, which is a little better."""
    loud = bimodal(CONV, 50.0)
    assert "1 divided (shortcut by 1, " in chosen(loud, context, gain=10.0)
    assert chosen(loud, context, gain=0.1) == "1 of 1 layers behind a concatenation taken apart"


def test_the_expected_error_is_the_measured_one(context: Context) -> None:
    """Within a decibel, for each form."""
    program = pipeline.run_passes(bimodal(CONV, 50.0), [Normalize()], context)
    (joined,), _ = find_joined(program.graph)
    seen = measure_segments(program, context, [joined.name], 4, "test")[joined.name]
    costs = FormCosts(joined, seen, UINT8, INT8)
    factors = costs.best_factors(1.0)
    assert factors[1] >= 16
    forms: dict[Form, SplitShortcuts | None] = {
        "whole": None,
        "layers": SplitShortcuts(islands=()),
        "factors": SplitShortcuts(method="powers", islands=()),
    }
    for form, step in forms.items():
        expected = -10 * np.log10(costs.error(form, factors if form == "factors" else ()))
        assert abs(expected - sqnr(program, step, context)) < 1.0, form


# What comes out --------------------------------------------------------------------------------------------------


def test_each_half_gets_quantizers_of_its_own(tiny: Program, context: Context) -> None:
    steps: list[Pass] = [*EXACT, SplitShortcuts(), Observe(), ChooseScales(), InsertQdq()]
    after = pipeline.run_passes(tiny, steps, context)
    assert after.plan is not None
    found = {layer.name: layer for layer in layers(after.float_model.graph)} if after.float_model else {}
    halves = [found[f"shortcut_part_{i}"] for i in range(2)]
    values = [(name_of(h.activations[0]), name_of(h.weight), name_of(h.output)) for h in halves]
    assert values[0][0] == "up" and values[1][0] == "b1_out"
    quantizers = [[after.plan.of(v, h.name) for v in names] for h, names in zip(halves, values, strict=True)]
    assert all(q is not None for pair in quantizers for q in pair)
    scales = [[np.asarray(q.scale).reshape(-1)[0] for q in pair if q is not None] for pair in quantizers]
    assert all(one != other for one, other in zip(*scales, strict=True))
    assert not {"shortcut_part_0", "shortcut_part_1"} & set(after.plan.islands)


BUILD = """
import sys
import onnxruntime
from mezzotint.runtime.session import open_session
for model in sys.argv[1:]:
    open_session(model, threads=1, optimized=model.replace(".onnx", "-built.onnx"))
print(onnxruntime.__version__)
"""


@pytest.mark.parametrize("oldest", [False, True])
def test_the_halves_run_on_integer_kernels(tmp_path: Path, oldest: bool) -> None:
    source = tmp_path / "tiny.onnx"
    ir.save(tiny_model(), source)
    recipes = {"qdq": Recipe("a", "", split(RECIPES["w8a8"])), "integer": Recipe("b", "", split(RECIPES["w8a8-steps"]))}
    files = []
    for spelling, recipe in recipes.items():
        bundle = compile_model(source, tmp_path / spelling, recipe=recipe, **SMALL, size=(8, 8))
        files.append(str(bundle.model_path.rename(tmp_path / f"{spelling}.onnx")))
    root = Path(__file__).parents[2]
    first = [Path(sys.prefix) / "oldest"] if oldest else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*first, root]))}
    command = [sys.executable, "-c", BUILD, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() != running_version()) == oldest
    for file in files:
        found = Counter(n.op_type for n in onnx.load(file.replace(".onnx", "-built.onnx")).graph.node)
        assert sum(found[op] for op in INTEGER_KERNELS) == CONVS + 1 + LINEARS + ATTENTIONS
        assert sum(found[op] for op in FLOAT_KERNELS) == 2


def split(recipe: Recipe) -> tuple[Pass, ...]:
    """A recipe's passes with this one in front of observe, and its islands."""
    passes = with_options(recipe, {"insert_qdq.islands": ["first", "last"]}).passes
    at = [p.name for p in passes].index("observe")
    return (*passes[:at], SplitShortcuts(), *passes[at:])


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="samples is 0"):
        SplitShortcuts(samples=0)
    with pytest.raises(RecipeError, match="gain is nan"):
        SplitShortcuts(gain=float("nan"))
    with pytest.raises(RecipeError, match=r"split_shortcuts\.method"):
        make_pass("split_shortcuts", {"method": "halves"})


def test_it_comes_before_the_quantizers() -> None:
    with pytest.raises(RecipeError, match="must come before 'qdq'"):
        Recipe("late", "", (*RECIPES["w8a8"].passes, SplitShortcuts()))


def test_an_island_that_matches_nothing_is_refused(normal: Program, context: Context) -> None:
    with pytest.raises(RecipeError, match=r"'upper\*' matches no layer"):
        SplitShortcuts(islands=("upper*",)).run(normal, context)


def test_islands_stay_whole(normal: Program, context: Context) -> None:
    after = pipeline.run_passes(normal, [SplitShortcuts(islands=("short*",))], context)
    note = "0 of 1 layers behind a concatenation taken apart; 1 left (shortcut: island 'short*')"
    assert after.history[-1].note == note
    assert graphs.model_text(after.model) == graphs.model_text(normal.model)


def test_the_halves_of_a_penultimate_layer_are_penultimate(normal: Program, context: Context) -> None:
    """Islands look through one addition; the sum of two halves is none."""
    after = pipeline.run_passes(normal, [SplitShortcuts()], context)
    found = list(layers(after.graph))
    islands = Islands(after, found, ("penultimate",), "test")
    assert {layer.name for layer in found if islands.reason(layer)} == {
        "b2_conv2",
        "shortcut_part_0",
        "shortcut_part_1",
    }
