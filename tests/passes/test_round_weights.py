"""round_weights: layers keep their outputs better than with weights rounded to nearest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline, snapshot
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import Format, scale_for_range
from mezzotint.compiler.core.pipeline import Context, Recipe
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.errors import PassError, RecipeError, StatsError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.lowering.integer import lower_integer
from mezzotint.compiler.rounding.gathering import gather
from mezzotint.compiler.rounding.gram import Unfold
from mezzotint.compiler.rounding.layer_inputs import Inputs, Latents, chosen_latents
from mezzotint.compiler.rounding.weights import find_weights, layer_name
from mezzotint.passes.clean_qdq import CleanQdq
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import make_pass, with_options
from mezzotint.passes.round_weights import RoundWeights
from tests.helpers.spreads import Backwards
from tests.helpers.tiny import program_of, tiny_program

STEPS = 3
Wide = npt.NDArray[np.float64]


@pytest.fixture
def program(context: Context) -> Program:
    """The tiny denoiser with weights of 4 bits, behind the passes of w8a8-steps."""
    steps = with_options(RECIPES["w8a8-steps"], {"choose_scales.weight_bits": 4}).passes
    return pipeline.run_passes(tiny_program(steps=STEPS), steps, context)


def rounded(program: Program, context: Context, **options: Any) -> Program:
    return pipeline.run_passes(program, [RoundWeights(**options)], context)


def sqnr(program: Program, context: Context) -> float:
    """Of epsilon in dB, on latents that calibration did not see."""
    assert program.float_model is not None
    signal, noise = 0.0, 0.0
    unseen = chosen_latents(program, replace(context, seed=5), STEPS)
    with (
        Executor(program.float_model, context.folder, threads=1) as exact,
        Executor(program.model, context.folder, threads=1, level="basic") as quantized,
    ):
        for latents in unseen:
            want = exact.call(program.signature, latents.x, latents.timestep)["epsilon"].astype(np.float64)
            got = quantized.call(program.signature, latents.x, latents.timestep)["epsilon"].astype(np.float64)
            signal, noise = signal + float(np.sum(want**2)), noise + float(np.sum((want - got) ** 2))
    return float(10 * np.log10(signal / noise))


@pytest.mark.parametrize("method", ["gptq", "gptaq", "comq", "obq"])
def test_epsilon_is_nearer_to_the_float_one(program: Program, context: Context, method: str) -> None:
    after = rounded(program, context, method=method)
    assert sqnr(after, context) > sqnr(program, context) + 0.8
    assert f"{'gptq' if method == 'gptq' else method}: " in after.history[-1].note


def test_nearest_with_the_plans_scales_changes_no_number(program: Program, context: Context) -> None:
    after = rounded(program, context, method="nearest", scales="keep")
    assert "100% of nearest's" in after.history[-1].note and "144 of 144 rows" in after.history[-1].note
    assert sqnr(after, context) == pytest.approx(sqnr(program, context), abs=1e-6)
    assert sqnr(rounded(program, context, method="nearest", scales="output"), context) > sqnr(program, context) + 0.3


def check_on_grid(program: Program, tolerance: float = 1e-6) -> None:
    """Every weight in front of its quantizer lies on the quantizer's grid, which is the plan's."""
    assert program.plan is not None
    for weight in find_weights(program.graph):
        scale = weight.scale()
        q = weight.rows() / scale[:, None]
        np.testing.assert_allclose(q, np.clip(np.rint(q), weight.format.qmin, weight.format.qmax), atol=tolerance * 8)
        planned = program.plan.of(weight.value.name or "", layer_name(weight.readers[0]))
        assert planned is not None
        np.testing.assert_array_equal(planned.scale, scale)


def test_weights_lie_on_the_grid_of_the_plan(program: Program, context: Context) -> None:
    check_on_grid(rounded(program, context))
    after = rounded(program, context, scales="output")
    pairs = zip(find_weights(after.graph), find_weights(program.graph), strict=True)
    assert not any(np.array_equal(a.scale(), b.scale()) for a, b in pairs)
    check_on_grid(after)
    weight = find_weights(after.graph)[0].value
    weight.const_value = ir.tensor(np.asarray(numpy_of(weight) * 1.01, np.float32), name=weight.name)
    with pytest.raises(AssertionError):
        check_on_grid(after)
    with pytest.raises(AssertionError):
        check_on_grid(program)


def test_the_float_model_keeps_its_weights(program: Program, context: Context) -> None:
    after = rounded(program, context)
    assert after.float_model is not None
    floats = {layer.name: layer for layer in layers(after.float_model.graph)}
    original = {weight.name: weight.rows() for weight in find_weights(program.graph)}
    for weight in find_weights(after.graph):
        kept = floats[weight.name].weight
        assert kept is not None
        turned = np.moveaxis(numpy_of(kept), weight.axis, 0).reshape(original[weight.name].shape)
        np.testing.assert_array_equal(turned, original[weight.name])
        assert not np.array_equal(weight.rows(), turned)


def test_the_integer_kernels_hold_the_chosen_integers(program: Program, context: Context) -> None:
    after = rounded(program, context)
    kernels = {n.name: n for n in lower_integer(after).graph if n.op_type == "QLinearConv"}
    checked = 0
    for weight in find_weights(after.graph):
        if weight.name in kernels:
            stored = kernels[weight.name].inputs[3]
            assert stored is not None
            q = numpy_of(stored).reshape(len(weight.scale()), -1)
            np.testing.assert_array_equal(q, np.rint(weight.rows() / weight.scale()[:, None]))
            checked += 1
    assert checked >= 2


def test_a_second_run_gives_the_same_bytes_whoever_rounds_the_weights(program: Program, context: Context) -> None:
    workers = Backwards()
    contexts = context, replace(context, spread=workers)
    runs = [rounded(program, each, method="gptaq", scales="output") for each in contexts]
    assert (
        workers.pieces["round_weights"] == len(find_weights(program.graph)) and workers.pieces["inputs of layers"] > 0
    )
    assert runs[0].history[-1].note == runs[1].history[-1].note
    check_on_grid(runs[1])
    for a, b in zip(*(find_weights(run.graph) for run in runs), strict=True):
        np.testing.assert_array_equal(a.rows(), b.rows())
        np.testing.assert_array_equal(a.scale(), b.scale())
    other = find_weights(rounded(program, replace(context, seed=3), method="gptaq", scales="output").graph)
    assert any(not np.array_equal(a.rows(), b.rows()) for a, b in zip(other, find_weights(runs[0].graph), strict=True))


def test_stages_are_cut_by_number_and_by_memory(program: Program, context: Context) -> None:
    count = len(find_weights(program.graph))
    assert f"{count} of {count}" not in rounded(program, context, stage=1).history[-1].note.split("stages")[1]
    assert f"in {count} stages" in rounded(program, context, stage=1).history[-1].note
    assert f"in {count} stages" not in rounded(program, context, stage=2, memory_gb=1).history[-1].note
    one_each = rounded(program, context, memory_gb=1e-9).history[-1].note
    stages = int(one_each.split(" in ")[1].split(" ")[0])
    assert count - 2 <= stages <= count  # q, k and v read the same: one matrix


def test_only_the_chosen_layers(program: Program, context: Context) -> None:
    after = rounded(program, context, layers=("down", "b1_*"))
    changed = [
        a.name
        for a, b in zip(find_weights(after.graph), find_weights(program.graph), strict=True)
        if not np.array_equal(a.rows(), b.rows())
    ]
    assert changed == [w.name for w in find_weights(program.graph) if w.name == "down" or w.name.startswith("b1_")]
    with pytest.raises(RecipeError, match="'nowhere' matches no layer"):
        rounded(program, context, layers=("nowhere",))


def test_obq_goes_through_large_layers_in_blocks(program: Program, context: Context) -> None:
    after = rounded(program, context, method="obq", exact_inputs=16)
    note = after.history[-1].note
    assert "obq: " in note and "obq in blocks of 16: " in note and "gptq" not in note
    whole = rounded(program, context, method="obq")
    pairs = zip(find_weights(after.graph), find_weights(whole.graph), strict=True)
    assert any(not np.array_equal(a.rows(), b.rows()) for a, b in pairs)


@pytest.mark.parametrize("method", ["gptq", "comq", "obq"])
def test_weights_that_were_pruned_stay_zero(context: Context, method: str) -> None:
    pruned = tiny_program(steps=STEPS)
    kept = {}
    for layer in layers(pruned.graph):
        if layer.weight is not None and layer.name in ("up", "q"):
            values = np.array(numpy_of(layer.weight))
            values.reshape(-1)[::2] = 0
            layer.weight.const_value = ir.tensor(values, name=layer.weight.name)
            kept[layer.name] = values != 0
    steps = with_options(RECIPES["w8a8-steps"], {"choose_scales.weight_bits": 4}).passes
    after = rounded(pipeline.run_passes(pruned, steps, context), context, method=method, exact_inputs=40)
    for weight in find_weights(after.graph):
        if weight.name in kept:
            assert not numpy_of(weight.value)[~kept[weight.name]].any() and numpy_of(weight.value).any()


def test_progress_reaches_its_end(program: Program, context: Context) -> None:
    seen: list[tuple[str, int, int]] = []
    RoundWeights(stage=4, calls=2).run(program, replace(context, progress=lambda *call: seen.append(call)))
    mine = [call for call in seen if call[0] == "round_weights"]
    total = len(mine)
    assert mine == [("round_weights", done, total) for done in range(1, total + 1)]
    count = len(find_weights(program.graph))
    assert total == count + -(-count // 4) * 2 * 2  # calls and batches


def test_latents_are_those_of_evenly_spread_calls(tiny: Program, context: Context) -> None:
    made = replace(tiny_program(steps=9), float_model=tiny.model)
    found = chosen_latents(made, context, 3)
    assert [(latents.call, latents.batch) for latents in found] == [(c, b) for c in (0, 4, 8) for b in (0, 1)]
    assert [latents.timestep for latents in found[::2]] == [made.deployment.timesteps[c] for c in (0, 4, 8)]
    assert len(chosen_latents(made, context, 50)) == 18


LAYERS = """<ir_version: 10, opset_import: ["" : 21]>
    two (float[batch,4,4,4] sample, int64[batch] timestep{inputs}) => (float[batch,4,4,4] epsilon)
    <{weights}> {{ {body} }}"""


def planned(
    body: str, weights: dict[str, tuple[int, ...]], values: list[str], axes: dict[str, int], **conditions: str
) -> Program:
    """A small program of 4-bit weights, quantized; `values` get uint8 grids over [-4, 4]."""
    inputs = "".join(f", {kind} {name}" for name, kind in conditions.items())
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    declared += ", int64[2] rows = {-1, 4}, int64[4] images = {-1, 4, 4, 4}"
    model = ir.from_onnx_text(LAYERS.format(inputs=inputs, weights=declared, body=body))
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        model.graph.register_initializer(value)
    scale, zero = scale_for_range(-4, 4, Format(8))
    quantizers = {Site(v): Quantizer(Format(8), scale, zero, "test") for v in values}
    fmt = Format(4, signed=True, symmetric=True)
    for name, axis in axes.items():
        array = np.moveaxis(numpy_of(model.graph.initializers[name]), axis, 0)
        limit = np.abs(array.reshape(len(array), -1)).max(axis=1)
        quantizers[Site(name)] = Quantizer(fmt, *scale_for_range(-limit, limit, fmt), "test", axis=axis)
    made = program_of(infer_shapes(model), shape=(4, 4, 4), steps=STEPS, conditions=tuple(conditions))
    return replace(made, plan=Plan(quantizers))


def inserted(made: Program, context: Context) -> Program:
    return pipeline.run_passes(made, [InsertQdq(islands=()), CleanQdq()], context)


@pytest.mark.parametrize("group", [2, 4])
def test_grouped_and_depthwise_convolutions(context: Context, group: int) -> None:
    body = f"""blurred = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (sample)
        [conv] epsilon = Conv <pads = [2, 0, 0, 2], group = {group}> (blurred, w)"""
    made = planned(body, {"w": (4, 4 // group, 3, 3)}, ["blurred", "epsilon"], {"w": 0})
    made = inserted(made, context)
    errors = {
        m: conv_error(rounded(made, context, method=m, scales="output"), context)
        for m in ("nearest", "gptq", "comq", "obq")
    }
    assert {m: round(errors[m] / errors["nearest"], 2) for m in errors if errors[m] > 0.9 * errors["nearest"]} == {
        "nearest": 1.0
    }


def conv_error(program: Program, context: Context) -> float:
    """Squared error of the convolution `conv` with its rounded weights, on its own quantized inputs, without one of its
    own on the output."""
    assert program.float_model is not None
    weight = next(w for w in find_weights(program.graph) if w.name == "conv")
    floats = numpy_of(program.float_model.graph.initializers["w"])
    tap = weight.readers[0].inputs[0]
    assert tap is not None and tap.name is not None
    unfold = Unfold.of(weight.readers[0], floats.shape)
    difference = (weight.rows() - floats.reshape(weight.rows().shape)).reshape(unfold.groups, -1, floats[0].size)
    total = 0.0
    with Executor(program.model, context.folder, taps=[tap.name], threads=1) as executor:
        for latents in chosen_latents(program, replace(context, seed=9), STEPS):
            x = executor.call(program.signature, latents.x, latents.timestep)[tap.name]
            sizes = unfold.positions(x.shape)
            every = np.unravel_index(np.arange(np.prod(sizes)), (sizes[0], int(np.prod(sizes[1:]))))
            columns = unfold.columns(x, (every[0], every[1]))
            total += float(np.square(np.einsum("pgd,grd->pgr", columns, difference)).sum())
    return total


def test_a_shared_weight_is_rounded_once_for_both_layers(context: Context) -> None:
    body = """x = Reshape (sample, rows) a = Gemm <transB = 1> (x, w) a_s = Sigmoid (a) b = Gemm <transB = 1> (a_s, w)
        epsilon = Reshape (b, images)"""
    made = inserted(planned(body, {"w": (4, 4)}, ["x", "a_s"], {"w": 0}), context)
    (weight,) = find_weights(made.graph)
    floats = {layer.name: layer for layer in layers(made.graph)}
    assert made.float_model is not None
    inputs = Inputs.of(weight, {layer.name: layer for layer in layers(made.float_model.graph)}, "test")
    assert len(inputs.taps) == 2 and floats == {}
    latents = chosen_latents(made, context, STEPS)
    options: dict[str, Any] = {"columns": 10**6, "balance": False, "shifts": False, "step": lambda: None}
    gathered = gather(made, context, [inputs], latents, **options).gram(inputs)[0]
    check_sum(gathered, made, inputs, latents, context)
    with pytest.raises(AssertionError):
        check_sum(gathered * np.float32(1.01), made, inputs, latents, context)
    after = rounded(made, context)
    assert after.history[-1].note.startswith("gptq: 1 of 1 weights")
    check_on_grid(after)


def check_sum(
    gram: npt.NDArray[np.float32], program: Program, inputs: Inputs, latents: list[Latents], context: Context
) -> None:
    total: Wide = np.zeros(gram.shape)
    with Executor(program.model, context.folder, taps=inputs.taps, threads=1) as executor:
        for batch in latents:
            seen = executor.call(program.signature, batch.x, batch.timestep)
            for tap in inputs.taps:
                rows = seen[tap].reshape(-1, 4).astype(np.float64)
                total += rows.T @ rows
    np.testing.assert_allclose(gram, total, rtol=1e-4)


def test_every_call_counts_alike(program: Program, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """With balance, a call whose inputs are a hundred times larger adds no more than the others."""
    assert program.float_model is not None
    floats = {layer.name: layer for layer in layers(program.float_model.graph)}
    weight = find_weights(program.graph)[0]
    inputs = Inputs.of(weight, floats, "test")
    latents = chosen_latents(program, context, STEPS)
    call = Executor.call

    def loud(self: Executor, signature: Any, x: Any, t: int, conditions: Any = None) -> dict[str, Any]:
        factor = 100 if t == latents[0].timestep else 1
        return {name: np.asarray(v * np.float32(factor)) for name, v in call(self, signature, x, t, conditions).items()}

    def traces(balance: bool) -> list[float]:
        options: dict[str, Any] = {"columns": 600, "balance": balance, "shifts": False, "step": lambda: None}
        parts = [gather(program, context, [inputs], [batch], **options).gram(inputs) for batch in latents]
        return [float(np.trace(part[0])) for part in parts]

    even = traces(True)
    monkeypatch.setattr(Executor, "call", loud)
    np.testing.assert_allclose(traces(True), even, rtol=1e-4)
    uneven = traces(False)
    assert uneven[0] > 100 * uneven[-1]


def test_constant_inputs_raise_the_damping_and_the_note_says_so(context: Context) -> None:
    body = "zeros = Mul (sample, nothing) ones = Add (zeros, many) [flat] epsilon = MatMul (ones, w)"
    made = planned(body, {"w": (4, 4), "nothing": (1,), "many": (1,)}, ["ones"], {"w": 1})
    for name, value in (("nothing", 0.0), ("many", 2.0)):
        made.graph.initializers[name].const_value = ir.tensor(np.array([value], np.float32), name=name)
    made = inserted(made, context)
    assert "damping raised: flat (" in rounded(made, context, damp=0.0).history[-1].note
    assert "damping" not in rounded(made, context).history[-1].note


def test_inputs_that_are_not_finite_are_refused(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    made = inserted(planned("[flat] epsilon = MatMul (sample, w)", {"w": (4, 4)}, ["sample"], {"w": 1}), context)
    call = Executor.call

    def broken(self: Executor, *arguments: Any) -> dict[str, Any]:
        return {n: v if n == "epsilon" else np.full_like(v, np.nan) for n, v in call(self, *arguments).items()}

    monkeypatch.setattr(Executor, "call", broken)
    with pytest.raises(PassError, match="not finite") as caught:
        RoundWeights().run(made, context)
    assert caught.value.where == "flat"


def test_conditions_reach_the_layers(context: Context) -> None:
    body = "mixed = Add (sample, text) [flat] epsilon = MatMul (mixed, w)"
    made = planned(body, {"w": (4, 4)}, ["mixed"], {"w": 1}, text="float[batch,4,4,4]")
    text = np.random.default_rng(0).standard_normal((3, 4, 4, 4)).astype(np.float32)
    given = replace(context, conditions={"text": text})
    a = rounded(inserted(made, given), given)
    b = rounded(inserted(made, given), replace(given, conditions={"text": np.flip(text, axis=-1).copy()}))
    assert not np.array_equal(find_weights(a.graph)[0].rows(), find_weights(b.graph)[0].rows())


def test_a_graph_with_its_batch_written_in(context: Context) -> None:
    made = planned("[flat] epsilon = MatMul (sample, w)", {"w": (4, 4)}, ["sample"], {"w": 1})
    for value in (*made.graph.inputs, *made.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([3, *list(value.shape)[1:]])
    after = rounded(inserted(made, context), context)
    check_on_grid(after)


def test_large_weights_are_not_held_in_memory(context: Context) -> None:
    made = planned("[flat] epsilon = Conv <pads = [1, 1, 1, 1]> (sample, w)", {"w": (4, 4, 9, 9)}, ["sample"], {"w": 0})
    made = replace(made, plan=Plan({**made.plan.quantizers, Site("epsilon"): made.plan.quantizers[Site("sample")]}))  # type: ignore[union-attr]
    made.graph[0].attributes["pads"] = ir.AttrInt64s("pads", [4, 4, 4, 4])
    after = rounded(inserted(made, context), context)
    tensor = after.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.location == store.WEIGHTS
    check_on_grid(after)


def test_one_scale_for_a_whole_weight_can_only_be_kept(context: Context) -> None:
    made = planned("[flat] epsilon = MatMul (sample, w)", {"w": (4, 4)}, ["sample"], {"w": 1})
    assert made.plan is not None
    fmt = Format(4, signed=True, symmetric=True)
    whole = Quantizer(fmt, *scale_for_range(-3, 3, fmt), "test")
    made = inserted(replace(made, plan=Plan({**made.plan.quantizers, Site("w"): whole})), context)
    check_on_grid_of(rounded(made, context, scales="keep"))
    with pytest.raises(RecipeError, match="one scale for all of its outputs"):
        rounded(made, context, scales="mse")


def check_on_grid_of(program: Program) -> None:
    (weight,) = find_weights(program.graph)
    q = weight.rows() / weight.scale()[:, None]
    np.testing.assert_allclose(q, np.rint(q), atol=1e-5)


def test_programs_that_do_not_fit_are_refused(program: Program, context: Context) -> None:
    with pytest.raises(StatsError, match="float graph to compare with is gone"):
        RoundWeights().run(replace(program, float_model=None), context)
    assert program.float_model is not None
    other = program.float_model.clone()
    next(n for n in other.graph if n.name == "down").name = "elsewhere"
    with pytest.raises(PassError, match="no layer 'down'"):
        RoundWeights().run(replace(program, float_model=other), context)
    assert program.plan is not None
    sites = {s: q for s, q in program.plan.quantizers.items() if s.value != "down_w"}
    with pytest.raises(PassError, match="no quantizer for the weight 'down_w'"):
        RoundWeights(scales="output").run(replace(program, plan=replace(program.plan, quantizers=sites)), context)


def test_a_graph_without_quantized_weights(tiny: Program, context: Context) -> None:
    made = replace(tiny, float_model=tiny.model, plan=Plan())
    assert RoundWeights().run(made, context).note == "no layer has quantized weights: nothing to round"


def test_orders_that_are_refused() -> None:
    steps = RECIPES["w8a8"].passes
    Recipe("good", "", (*steps, RoundWeights()))
    with pytest.raises(RecipeError, match="needs 'qdq'"):
        Recipe("early", "", (RoundWeights(), *steps))
    with pytest.raises(RecipeError, match="'rounded'"):
        Recipe("twice", "", (*steps, RoundWeights(), RoundWeights()))


@pytest.mark.parametrize(
    "options",
    [{"method": "best"}, {"damp": -1.0}, {"block": 0}, {"calls": 0}, {"memory_gb": 0.0}, {"alpha": float("nan")}],
)
def test_options_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"round_weights.{next(iter(options))}"):
        make_pass("round_weights", options)


def test_a_saved_program_keeps_the_rounded_weights(program: Program, context: Context, tmp_path: Path) -> None:
    made = rounded(program, context)
    snapshot.save_program(made, tmp_path / "saved")
    back, _ = snapshot.load_program(tmp_path / "saved")
    for a, b in zip(find_weights(made.graph), find_weights(back.graph), strict=True):
        np.testing.assert_array_equal(a.rows(), b.rows())
