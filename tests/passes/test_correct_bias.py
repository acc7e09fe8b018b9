"""correct_bias: what a layer is off on average is gone afterwards, the kernels stay, and harm is thrown away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.calibration.calibrate import follow_trajectories
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Recipe
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.biases import QuantizedLayer, quantized_layers
from mezzotint.compiler.correction.channel_means import ChannelMeans
from mezzotint.compiler.errors import PassError, RecipeError, StatsError
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import model_text, name_of, numpy_of
from mezzotint.passes.correct_bias import CorrectBias
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import make_pass, with_options
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images
from tests.conftest import Check
from tests.helpers.tiny import CONVS, LINEARS, SIGNATURE, tiny_program

LAYERS = CONVS + LINEARS
EACH = CorrectBias(against="network", stages=LAYERS, steps="mean", held_out=0)
FLOAT = """<ir_version: 10, opset_import: ["" : 21]>
denoiser (float[batch,2,4,4] sample, int64[batch] timestep) => (float[batch,2,4,4] epsilon)
<float[2,2,1,1] kernel = {1, 2, -3, 4}, float[4,4] square = {1, 0, 0, 2, 0, 1, 3, 0, 0, -1, 1, 0, -4, 0, 0, 1},
 float[2] shared = {0.5, -0.5}, int64[1] flat_shape = {-1}, int64[1] first = {0},
 float[5,2] table = {1, 2, 1, 2, 3, 4, 3, 4, 5, 6}>
{
    one = Gather <axis = 0> (timestep, first)
    rows = Gather <axis = 0> (table, one)
    timed_bias = Reshape (rows, flat_shape)
    [timed] a = Conv (sample, kernel, timed_bias)
    [constant] b = Conv (a, kernel, shared)
    [sharing] c = Conv (b, kernel, shared)
    [without] d = Conv (c, kernel)
    [plain] epsilon = MatMul (d, square)
}"""


def quantized(context: Context, recipe: str = "w8a8-steps", bits: int = 4) -> Program:
    options: dict[str, Any] = {"choose_scales.weight_bits": bits}
    if recipe == "w8a8-steps":
        options["insert_qdq.islands"] = ["first", "last"]
    return pipeline.run_passes(tiny_program(), with_options(RECIPES[recipe], options).passes, context)


@pytest.fixture
def program(context: Context) -> Program:
    return quantized(context)


def correct(program: Program, context: Context, step: CorrectBias = EACH) -> Program:
    return pipeline.run_passes(program, [step], context)


def errors(program: Program, context: Context) -> dict[str, Any]:
    """E[y_q - y] of every layer by call `[calls, C]`, over the calibration samples; taken from whole values."""
    found = list(quantized_layers(program, "test"))
    assert program.float_model is not None
    taps = [[name_of(q.layer.output) for q in found], [name_of(q.output) for q in found]]
    seen: dict[str, dict[float, list[Any]]] = {q.layer.name: {} for q in found}
    with (
        Executor(program.float_model, context.folder, taps=taps[0], threads=1) as exact,
        Executor(program.model, context.folder, taps=taps[1], threads=1, level="none") as inner,
    ):

        def denoiser(x: Images, t: float, conditions: Conditions) -> Images:
            want, got = exact.call(SIGNATURE, x, t, conditions), inner.call(SIGNATURE, x, t, conditions)
            for layer, a, b in zip(found, *taps, strict=True):
                difference = np.moveaxis(got[b].astype(np.float64) - want[a], layer.axis, -1)
                seen[layer.layer.name].setdefault(t, []).append(difference.reshape(-1, layer.channels).mean(axis=0))
            return np.asarray(want["epsilon"], np.float32)

        follow_trajectories(program, context, denoiser, "test")
    return {name: np.array([np.mean(call, axis=0) for call in calls.values()]) for name, calls in seen.items()}


def check_unbiased(program: Program, context: Context) -> None:
    for name, mean in errors(program, context).items():
        np.testing.assert_allclose(mean.mean(axis=0), 0, atol=2e-6, err_msg=name)


def test_no_layer_is_off_on_average_afterwards(program: Program, context: Context) -> None:
    corrected = correct(program, context)
    check_unbiased(corrected, context)
    with pytest.raises(AssertionError):
        check_unbiased(program, context)
    planted = layer_of(corrected, "down")
    assert planted.bias is not None
    planted.bias.const_value = ir.tensor(numpy_of(planted.bias) * np.float32(1.01), name=name_of(planted.bias))
    with pytest.raises(AssertionError):
        check_unbiased(corrected, context)


def layer_of(program: Program, name: str) -> QuantizedLayer:
    return next(q for q in quantized_layers(program, "test") if q.layer.name == name)


def test_a_planted_error_is_found(program: Program, context: Context) -> None:
    """One per cent on a bias of the quantized graph: afterwards it is what it would have been without."""
    want = layer_of(correct(program, context), "down").values()
    bias = layer_of(program, "down").bias
    assert bias is not None
    bias.const_value = ir.tensor(numpy_of(bias) * np.float32(1.01), name=bias.name)
    got = layer_of(correct(program, context), "down").values()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    unseen = replace(EACH, against="layer", stages=1)  # it asks only what the weights do
    with pytest.raises(AssertionError):
        other = layer_of(correct(program, context, unseen), "down").values()
        np.testing.assert_allclose(other, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_rows_of_a_time_table_are_corrected_by_themselves(program: Program, context: Context) -> None:
    layer = layer_of(program, "b1_conv1")
    assert layer.table is not None
    table = layer.table[0]
    planted = numpy_of(table) + np.array([[0.3], [0.0], [-0.3]], np.float32)
    table.const_value = ir.tensor(planted, name=table.name)
    left = {
        steps: np.abs(errors(correct(program, context, replace(EACH, steps=steps)), context)["b1_conv1"]).max()
        for steps in ("mean", "rows")
    }
    assert left["mean"] > 0.25
    assert left["rows"] < 0.02


def check_shift(before: Program, after: Program, context: Context, factor: float = 1.0) -> None:
    """The shift of a linear layer is E[x] (Q(W) - W), computed here from whole values of the quantized graph."""
    layer, shifted = layer_of(before, "v"), layer_of(after, "v")
    assert layer.layer.weight is not None and before.float_model is not None
    x, w = (name_of(v) for v in layer.node.inputs[:2])
    means = []
    with (
        Executor(before.float_model, context.folder, threads=1) as exact,
        Executor(before.model, context.folder, taps=[x, w], threads=1, level="none") as inner,
    ):

        def denoiser(latents: Images, t: float, conditions: Conditions) -> Images:
            seen = inner.call(SIGNATURE, latents, t, conditions)
            difference = seen[w].astype(np.float64) - numpy_of(layer.layer.weight)  # type: ignore[arg-type]
            means.append(seen[x].reshape(-1, len(difference)).astype(np.float64).mean(axis=0) @ difference)
            return np.asarray(exact.call(SIGNATURE, latents, t, conditions)["epsilon"], np.float32)

        follow_trajectories(before, context, denoiser, "test")
    want = np.mean(means, axis=0)
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose((layer.values() - shifted.values())[0] * factor, want, rtol=1e-4, atol=1e-5)


def test_against_the_layer_only_what_the_weights_do_is_seen(program: Program, context: Context) -> None:
    after = correct(program, context, CorrectBias(held_out=0))
    check_shift(program, after, context)
    with pytest.raises(AssertionError):
        check_shift(program, after, context, factor=1.01)


def with_float_graph(program: Program) -> Program:
    """The golden graph with a second layer, in float, next to it."""
    return replace(program, float_model=infer_shapes(ir.from_onnx_text(FLOAT)), frozen=(0, 2, 4))


def test_golden(check_golden: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table, a constant, one that two layers share, none at all in front of an int8 kernel, none behind a MatMul."""
    monkeypatch.setattr(ChannelMeans, "overall", lambda self: np.full((1, self.channels), 0.25))
    monkeypatch.setattr(ChannelMeans, "by_row", lambda self: np.full((3, self.channels), [[0.5], [1.0], [1.5]]))
    after = check_golden(CorrectBias(held_out=0), "every_kind", prepare=with_float_graph)
    assert after.history[-1].note.startswith("5 biases corrected (1 tables)")


def test_what_the_pictures_do_not_thank_for_is_thrown_away(
    program: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChannelMeans, "overall", lambda self: np.full((1, self.channels), 0.5))
    before = model_text(program.model)
    judged = correct(program, context, CorrectBias(held_out=2))
    assert "; thrown away: on held-out noise pictures" in judged.history[-1].note
    assert model_text(judged.model) == before
    for a, b in zip(quantized_layers(judged, "test"), quantized_layers(program, "test"), strict=True):
        np.testing.assert_array_equal(a.values(), b.values())
    unseen = correct(program, context, CorrectBias(held_out=0))
    assert unseen.history[-1].note.endswith("; not judged")
    assert np.abs(layer_of(unseen, "down").values() - layer_of(program, "down").values()).min() > 0.4


def test_what_helps_is_kept(program: Program, context: Context) -> None:
    """A bias that is off by a half: taking it out is what pictures thank for."""
    bias = layer_of(program, "down").bias
    assert bias is not None
    bias.const_value = ir.tensor(numpy_of(bias) + np.float32(0.5), name=bias.name)
    kept = correct(program, context, replace(EACH, held_out=2))
    assert "; kept: on held-out noise pictures" in kept.history[-1].note
    assert np.abs(layer_of(kept, "down").values() - layer_of(program, "down").values()).min() > 0.3


def test_a_bias_that_would_not_fit_stays(program: Program, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChannelMeans, "overall", lambda self: np.full((1, self.channels), 1e9))
    after = correct(program, context, CorrectBias(held_out=0, steps="mean"))
    assert f"; {LAYERS} would not fit into 32 bits and stay" in after.history[-1].note
    assert model_text(after.model) == model_text(program.model)


def test_a_second_run_gives_the_same_biases(program: Program, context: Context) -> None:
    found = [correct(program, context, CorrectBias(held_out=0)) for _ in range(2)]
    for a, b in zip(*(quantized_layers(p, "test") for p in found), strict=True):
        np.testing.assert_array_equal(a.values(), b.values())


def test_a_program_that_does_not_fit_is_refused(program: Program, context: Context) -> None:
    with pytest.raises(StatsError, match="the float graph to compare with is gone"):
        EACH.run(replace(program, float_model=None), context)
    other = replace(program, model=program.model.clone())
    next(node for node in other.graph if node.name == "down").name = "elsewhere"
    with pytest.raises(PassError, match="no layer 'down'"):
        EACH.run(other, context)


def test_nothing_quantized_is_said(context: Context) -> None:
    options = {"insert_qdq.islands": ["*"]}
    made = pipeline.run_passes(tiny_program(), with_options(RECIPES["w8a8"], options).passes, context)
    assert correct(made, context).history[-1].note == "no layer is quantized: nothing to correct"


def test_orders_and_options_that_are_refused() -> None:
    with pytest.raises(RecipeError, match="needs 'qdq'"):
        Recipe("short", "", (*RECIPES["float"].passes, CorrectBias()))
    for options in ({"stages": 0}, {"held_out": -1}, {"steps": "each"}, {"against": "nobody"}):
        with pytest.raises(RecipeError, match=f"correct_bias.{next(iter(options))}"):
            make_pass("correct_bias", dict(options))
