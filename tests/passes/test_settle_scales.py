"""settle_scales: each row is what the float network needs behind the quantized calls, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint import compile_model
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import UINT8, scale_for_range
from mezzotint.compiler.core.pipeline import Context, Recipe
from mezzotint.compiler.core.program import Plan, Program, Site
from mezzotint.compiler.errors import PassError, RecipeError, StatsError
from mezzotint.compiler.graph.nodes import is_constant, model_text, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.lowering.integer import lower_integer
from mezzotint.compiler.scales.row_inputs import find_tables, stacked, table_quantizers, with_row_inputs
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import make_pass, with_options
from mezzotint.passes.settle_scales import SettleScales
from mezzotint.runtime.sampling import samplers
from tests.helpers.models import SMALL, Compiled
from tests.helpers.tiny import SIGNATURE, tiny_program

Numbers = npt.NDArray[np.float32]
STEPS = 4
MINMAX = SettleScales(activations="minmax")


def quantized(context: Context, steps: int = STEPS, **settings: Any) -> Program:
    """Recipe pcr up to settle_scales, with tables for every activation, and ranges from extremes."""
    options = {"step_scales.gain": -1000.0, "step_scales.activations": "minmax", **settings}
    return pipeline.run_passes(tiny_program(steps=steps), with_options(RECIPES["pcr"], options).passes[:-1], context)


@pytest.fixture
def program(context: Context) -> Program:
    return quantized(context)


def settle(program: Program, context: Context) -> Program:
    """On a clone, as in a compilation."""
    return pipeline.run_passes(program, [MINMAX], context)


def follow_quantized(program: Program, context: Context, calls: int) -> Numbers:
    """The latents of all samples after the first calls, each with its own row: as PCR does, from the noise on."""
    tables = find_tables(program, "test")
    scales, zeros = stacked(program)
    x = samplers.initial_noise(context.seed, (context.samples, *program.shape))
    stepper = samplers.Stepper(program.deployment.solver(program.schedule))
    state = stepper.begin(x)
    with Executor(with_row_inputs(program.model, tables), context.folder, threads=1) as executor:
        for k in range(calls):
            rows = {tables.scales_row: scales[k], tables.zeros_row: zeros[k]}
            output = executor.call(SIGNATURE, state["x"], program.deployment.timesteps[k], rows)["epsilon"]
            state = stepper.advance(k, state, output)
    return state["x"]


def extremes(program: Program, context: Context, x: Numbers, call: int) -> dict[str, tuple[float, float]]:
    """(low, high) of every activation of the float network on these latents."""
    assert program.float_model is not None
    names = [site.value for site in table_quantizers(program)]
    inputs = {v.name for v in program.float_model.graph.inputs}
    taps = [name for name in names if name not in inputs]
    with Executor(program.float_model, context.folder, taps=taps, threads=1) as executor:
        seen = {"sample": x, **executor.call(SIGNATURE, x, program.deployment.timesteps[call])}
    return {name: (float(seen[name].min()), float(seen[name].max())) for name in names}


def check_rows(program: Program, context: Context, factor: float = 1.0) -> None:
    """Every row against a trajectory of its own. Batches are cut otherwise here, hence the last bits."""
    for call in range(len(program.deployment.timesteps)):
        ranges = extremes(program, context, follow_quantized(program, context, call), call)
        for site, quantizer in table_quantizers(program).items():
            scale, _ = scale_for_range(*ranges[site.value], UINT8)
            np.testing.assert_allclose(quantizer.scale[call] * factor, scale, rtol=1e-3, err_msg=f"{site} {call}")


def test_each_row_is_measured_behind_the_quantized_calls(program: Program, context: Context) -> None:
    settled = settle(program, context)
    check_rows(settled, context)
    with pytest.raises(AssertionError):
        check_rows(settled, context, factor=1.01)
    with pytest.raises(AssertionError):  # rows of the float trajectory are others
        check_rows(program, context)


def test_the_first_row_is_that_of_the_float_trajectory(program: Program, context: Context) -> None:
    before, after = stacked(program), stacked(settle(program, context))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new[0], old[0])
    assert np.all(np.any(after[0][1:] != before[0][1:], axis=1))


def check_table(program: Program, factor: float = 1.0) -> None:
    """The graph gathers what the plan says."""
    tables = find_tables(program, "test")
    scales, zeros = stacked(program)
    np.testing.assert_array_equal(numpy_of(program.graph.initializers[tables.scales]), scales * np.float32(factor))
    np.testing.assert_array_equal(numpy_of(program.graph.initializers[tables.zeros]), zeros)


def test_graph_and_plan_agree_and_the_rest_stays(program: Program, context: Context) -> None:
    before = model_text(program.model)
    settled = settle(program, context)
    check_table(settled)
    with pytest.raises(AssertionError):
        check_table(settled, factor=1.01)
    assert model_text(settled.model) == before
    assert program.plan is not None and settled.plan is not None
    assert list(settled.plan.quantizers) == list(program.plan.quantizers)
    assert (settled.plan.groups, settled.plan.islands) == (program.plan.groups, program.plan.islands)
    for site, q in program.plan.quantizers.items():
        new = settled.plan.quantizers[site]
        assert (new.by == "settle_scales") == q.table
        assert q.table or new is q
    assert settled.history[-1].note.startswith(f"{len(table_quantizers(program))} tables of {STEPS} rows; ")


def test_calls_that_share_a_row_get_the_range_of_all_of_them(context: Context) -> None:
    """Two calls: with a row for each, the second is measured behind the first, and so it is when they share one."""
    apart = settle(quantized(context, steps=2), context)
    shared = settle(quantized(context, steps=2, **{"group_steps.method": "even", "group_steps.groups": 1}), context)
    check_shared(apart, shared)
    with pytest.raises(AssertionError):
        check_shared(apart, shared, factor=1.01)


def check_shared(apart: Program, shared: Program, factor: float = 1.0) -> None:
    joint = table_quantizers(shared)
    assert {len(q.scale) for q in joint.values()} == {1}
    for site, q in table_quantizers(apart).items():
        lows = -q.scale * q.zero_point.astype(np.float32)
        highs = q.scale * (255 - q.zero_point.astype(np.float32))
        step = float(joint[site].scale[0]) * factor
        zero = int(joint[site].zero_point[0])
        assert abs(lows.min() + step * zero) <= 1.01 * step
        assert abs(highs.max() - step * (255 - zero)) <= 1.01 * step


def check_biases(program: Program, other: Program) -> None:
    """The biases of convolutions in the lowered `program`, `[rows, C]`, are round(b / (x_scale w_scale)) by `other`."""
    assert program.float_model is not None and other.plan is not None
    kernels = {node.name: node for node in lower_integer(program).graph if node.op_type == "QLinearConv"}
    checked = 0
    for layer in layers(program.float_model.graph):
        if layer.name not in kernels or layer.bias is None or not is_constant(layer.bias):
            continue
        part, w_scale = kernels[layer.name].inputs[8], kernels[layer.name].inputs[4]
        assert part is not None and w_scale is not None
        split = part.producer()
        assert split is not None and split.op_type == "Split" and split.inputs[0] is not None
        gather = split.inputs[0].producer()
        assert gather is not None and gather.inputs[0] is not None and split.inputs[1] is not None
        borders = np.cumsum(numpy_of(split.inputs[1]))[:-1]
        rows = np.split(numpy_of(gather.inputs[0]), borders, axis=1)[list(split.outputs).index(part)]
        x_scale = other.plan.quantizers[Site(layer.activations[0].name or "")].scale.astype(np.float64)
        want = np.rint(numpy_of(layer.bias).astype(np.float64) / (x_scale[:, None] * numpy_of(w_scale)))
        np.testing.assert_array_equal(rows, want)
        checked += 1
    assert checked >= 3


def test_biases_of_the_integer_lowering_are_in_the_new_scales(program: Program, context: Context) -> None:
    settled = settle(program, context)
    check_biases(settled, settled)
    with pytest.raises(AssertionError):
        check_biases(settled, program)


def test_what_is_static_stays_static(context: Context) -> None:
    options: dict[str, Any] = {"step_scales.gain": 1000.0}
    program = quantized(context, **options)
    settled = pipeline.run_passes(program, [SettleScales()], context)
    assert settled.history[-1].note == "no scale moves with the timestep: nothing to settle"
    assert settled.plan is program.plan


def test_progress_counts_both_networks(program: Program, context: Context) -> None:
    seen: list[tuple[str, int, int]] = []
    MINMAX.run(program, replace(context, progress=lambda *call: seen.append(call)))
    total = 2 * STEPS * 2  # two networks, two batches
    assert seen == [("settle_scales", done, total) for done in range(1, total + 1)]


def test_a_second_run_gives_the_same_tables(program: Program, context: Context) -> None:
    first, again = stacked(settle(program, context)), stacked(settle(program, context))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_real_unet(unet: Compiled, tmp_path: Path) -> None:
    """Its residual additions become integer kernels around gathered scales."""
    bundle = compile_model(unet.exported, tmp_path / "bundle", recipe="pcr", size=(8, 8), **SMALL)
    pictures = bundle.sample(2, seed=3)
    assert np.isfinite(pictures).all()


def test_a_program_that_does_not_fit_is_refused(program: Program, context: Context) -> None:
    assert program.plan is not None
    with pytest.raises(StatsError, match="the float graph to measure is gone"):
        MINMAX.run(replace(program, float_model=None), context)
    site, q = next(iter(table_quantizers(program).items()))
    other = {**program.plan.quantizers, site: replace(q, scale=q.scale * np.float32(1.01))}
    with pytest.raises(PassError, match="no table of scales"):
        MINMAX.run(replace(program, plan=Plan(other, program.plan.islands, program.plan.groups)), context)


def test_tables_of_another_kind_are_refused(program: Program, context: Context) -> None:
    """New rows would be per tensor, each with its own zero point."""
    assert program.plan is not None
    for axis, zeros in ((1, None), (None, 7)):
        tables = {
            site: replace(q, axis=axis, zero_point=q.zero_point if zeros is None else np.full_like(q.zero_point, zeros))
            for site, q in program.plan.quantizers.items()
            if q.table
        }
        plan = Plan({**program.plan.quantizers, **tables}, program.plan.islands, program.plan.groups)
        with pytest.raises(RecipeError, match="tables of another kind") as caught:
            MINMAX.run(replace(program, plan=plan), context)
        assert "channel_scales" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("w8a8-steps", {"channel_scales.gain": -1000.0}), ("pcr", {"step_scales.zero_point": "constant"})],
)
def test_recipes_with_tables_of_another_kind(context: Context, recipe: str, settings: dict[str, Any]) -> None:
    settings = {"step_scales.gain": -1000.0, **settings}
    steps = [p for p in with_options(RECIPES[recipe], settings).passes if p.name != "settle_scales"]
    made = pipeline.run_passes(tiny_program(steps=STEPS), steps, context)
    with pytest.raises(RecipeError, match="tables of another kind"):
        MINMAX.run(made, context)


@pytest.mark.parametrize("missing", ["step_scales", "insert_qdq"])
def test_orders_that_are_refused(missing: str) -> None:
    with pytest.raises(RecipeError):
        Recipe("short", "", tuple(p for p in RECIPES["pcr"].passes if p.name not in (missing, "clean_qdq")))


@pytest.mark.parametrize("options", [{"percentile": 20}, {"activations": "median"}])
def test_options_that_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"settle_scales.{next(iter(options))}"):
        make_pass("settle_scales", dict(options))
