"""allocate_steps: budgets that add up, the three ways to spend one, and what becomes of calls that get nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context, Recipe
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.graph.ops import layers
from mezzotint.passes.allocate_steps import AllocateSteps, apportion, density_weights, even, middle_feature, normal_mass
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.group_steps import GroupSteps
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import make_pass
from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from tests.helpers.models import Compiled
from tests.helpers.tiny import program_of, short_schedule, tiny_program

weights = arrays.arrays(np.float64, st.integers(1, 12), elements=st.one_of(st.just(0.0), st.floats(0.01, 100)))


@given(weights, st.integers(1, 9), st.floats(0, 1))
def test_a_budget_is_spent_whole_and_nobody_gets_more_than_there_is(w: Doubles, most: int, share: float) -> None:
    budget = round(share * most * len(w))
    counts = apportion(w, budget, most)
    assert sum(counts) == budget
    assert all(0 <= c <= most for c in counts)


def check_proportional(w: Doubles, budget: int, factor: float = 1.0) -> None:
    got = np.array(apportion(w, budget, budget), np.float64) * factor
    assert np.all(np.abs(got - budget * w / w.sum()) < 1)


@given(arrays.arrays(np.float64, st.integers(2, 12), elements=st.floats(0.5, 100)), st.integers(10_000, 50_000))
def test_parts_follow_the_weights_within_one(w: Doubles, budget: int) -> None:
    check_proportional(w, budget)
    with pytest.raises(AssertionError):
        check_proportional(w, budget, factor=1.01)


@given(weights, st.integers(1, 9), st.floats(0, 1))
def test_a_larger_weight_never_gets_less(w: Doubles, most: int, share: float) -> None:
    counts = apportion(w, round(share * most * len(w)), most)
    for i in range(len(w)):
        for j in range(len(w)):
            assert w[i] <= w[j] or counts[i] >= counts[j]


@pytest.mark.parametrize(
    ("w", "budget", "most", "expected"),
    [
        ([1, 1, 2], 8, 8, (2, 2, 4)),
        ([1, 1, 8], 8, 4, (2, 2, 4)),  # what the third cannot take goes to the others
        ([0, 0, 1], 6, 4, (1, 1, 4)),  # evenly, where they have no weight
        ([0, 0, 0], 6, 4, (2, 2, 2)),
        ([1, 1, 1], 4, 4, (2, 1, 1)),
        ([5, 1], 8, 4, (4, 4)),
        ([0, 1], 2, 4, (0, 2)),
    ],
)
def test_apportion(w: list[float], budget: int, most: int, expected: tuple[int, ...]) -> None:
    assert apportion(np.array(w, np.float64), budget, most) == expected


@given(st.integers(1, 60), st.integers(1, 500))
def test_even_parts_differ_by_one_at_most(calls: int, budget: int) -> None:
    counts = even(calls, budget)
    assert sum(counts) == budget
    assert max(counts) - min(counts) <= 1


def check_draws(timesteps: tuple[int, ...], mean: float, deviation: float, factor: float = 1.0) -> None:
    """Against draws, as PTQ4DM makes them: clamped, and each at the nearest call."""
    draws = np.random.default_rng(0).normal(mean * factor, deviation, 400_000)
    nearest = np.abs(np.clip(draws, 0, 999)[:, None] - np.array(timesteps)).argmin(axis=1)
    shares = np.bincount(nearest, minlength=len(timesteps)) / len(draws)
    np.testing.assert_allclose(normal_mass(timesteps, mean, deviation), shares, atol=1.5e-3)


def test_the_mass_of_a_call_is_the_share_of_its_draws() -> None:
    for timesteps in ((900, 600, 300, 0), (999, 500, 10), (7,)):
        check_draws(timesteps, 400.0, 400.0)
    with pytest.raises(AssertionError):
        check_draws((900, 600, 300, 0), 400.0, 400.0, factor=1.01)


def test_skewed_leans_to_the_clean_end_which_comes_last() -> None:
    mass = normal_mass((999, 750, 500, 250, 0), 400.0, 400.0)
    assert mass.sum() == pytest.approx(1.0)
    assert mass[-1] > mass[0]
    assert normal_mass((0, 250, 500, 750, 999), 400.0, 400.0).tolist() == mass[::-1].tolist()


def features(*rows: list[float]) -> Doubles:
    return np.array(rows, np.float64)[:, None, :]


def test_density_by_hand() -> None:
    """Three equal calls and one far away: D = 2, 2, 2, 0 and V is largest for the last."""
    f = features([1, 0], [1, 0], [1, 0], [0, 3])
    np.testing.assert_allclose(density_weights(f, 0.5, 0.0), [1, 1, 1, 0])
    # V = 1, 1, 1, 3
    np.testing.assert_allclose(density_weights(f, 0.5, 1.2), [1, 1, 1, 1.2])


def check_scale_free(f: Doubles, other: Doubles) -> None:
    np.testing.assert_allclose(density_weights(other, 0.5, 1.2), density_weights(f, 0.5, 1.2), rtol=1e-9)


def test_density_does_not_depend_on_the_size_of_the_feature() -> None:
    f = np.random.default_rng(2).standard_normal((6, 2, 5)).cumsum(axis=0)
    check_scale_free(f, f * 7)
    with pytest.raises(AssertionError):
        check_scale_free(f, f + 0.01 * np.abs(f).max())


def test_calls_that_are_all_the_same_weigh_the_same() -> None:
    assert apportion(density_weights(np.ones((4, 2, 3)), 0.5, 1.2), 8, 4) == (2, 2, 2, 2)
    assert density_weights(np.ones((1, 2, 3)), 0.5, 1.2).tolist() == [0.0]


@pytest.fixture
def program(context: Context) -> Program:
    return pipeline.run_passes(tiny_program(steps=5), [Normalize()], context)


def allotted(program: Program, context: Context, **options: Any) -> tuple[int, ...]:
    made = make_pass("allocate_steps", options)
    return made.run(program, context).allocation


def test_methods_on_a_graph(program: Program, context: Context) -> None:
    assert allotted(program, context) == (2, 2, 2, 2, 2)
    assert allotted(program, context, share=1.0) == (4,) * 5
    assert allotted(program, context, share=0.01) == (0, 0, 0, 0, 1)
    skewed = allotted(program, context, method="skewed", mean=0.0, deviation=0.2)
    assert sum(skewed) == 10
    assert skewed[0] == 0 and skewed[-1] == 4
    density = allotted(program, context, method="density")
    assert sum(density) == 10
    assert density == allotted(program, context, method="density")
    assert density != allotted(program, context, method="density", feature="epsilon", diversity=0.0)


def test_notes(program: Program, context: Context) -> None:
    note = AllocateSteps(method="skewed", mean=0.0, deviation=0.2).run(program, context).note
    assert note.startswith("10 of 20 samples count, 0 to 4 at a call, none at ")
    note = AllocateSteps(method="density").run(program, context).note
    name = middle_feature(program, context)
    assert note.endswith(f"; the feature is {name}, 1024 numbers")
    positions = [out.name for node in program.graph for out in node.outputs]
    assert positions.index("b1_out") < positions.index(name) < positions.index("joined"), "while the shortcut waits"


def shape_of(node: ir.Node) -> list[object]:
    return list(node.outputs[0].shape or ())


def test_the_feature_of_a_real_unet_is_in_its_middle_block(unet: Compiled, context: Context) -> None:
    """Two resolutions, 8x8 and 4x4: the middle block works at 4x4."""
    schedule: Schedule = short_schedule()
    deployment = Deployment.of(schedule, "ddim", 3)
    program = import_onnx(unet.exported, context.folder, schedule=schedule, deployment=deployment, size=(8, 8))
    program = pipeline.run_passes(program, [Normalize(), FreezeTime()], context)
    name = middle_feature(program, context)
    nodes = list(program.graph)
    reader = next(layer.node for layer in layers(program.graph) if name in [v.name for v in layer.activations])
    before = nodes[: nodes.index(reader)]
    assert sum(n.op_type == "Conv" and 2 in n.attributes["strides"].as_ints() for n in before) == 1, "it was halved"
    assert not any(n.op_type == "Concat" and shape_of(n)[1:2] != [1] and len(shape_of(n)) == 4 for n in before)
    behind = [n.op_type for n in nodes[nodes.index(reader) :]]
    assert behind.index("Conv") < behind.index("Concat"), "still in the middle block"
    after = AllocateSteps(method="density").run(program, context)
    assert sum(after.allocation) == 6
    assert name in after.note


def test_calls_without_samples_are_refused_by_whoever_needs_them(program: Program, context: Context) -> None:
    empty = AllocateSteps(method="skewed", mean=0.0, deviation=0.1, share=0.2).run(program, context)
    assert empty.allocation[0] == 0
    measured = pipeline.run_passes(empty, [Observe(groups=0), ChooseScales()], context)
    with pytest.raises(StatsError, match=r"were never calibrated: 800 \(nearest calibrated: "):
        GroupSteps().run(measured, context)
    static = pipeline.run_passes(empty, [Observe(), ChooseScales()], context)
    assert static.plan is not None  # one scale for all calls can be had from any of them


def test_the_option_feature_must_name_a_value(program: Program, context: Context) -> None:
    with pytest.raises(RecipeError, match="computes no value 'b1_ot'") as caught:
        AllocateSteps(method="density", feature="b1_ot").run(program, context)
    assert "'b1_out'" in str(caught.value.hint)


@pytest.mark.parametrize(
    "options",
    [
        {"share": 0},
        {"share": 1.01},
        {"share": float("nan")},
        {"mean": -0.1},
        {"deviation": 0},
        {"deviation": float("inf")},
        {"radius": 0},
        {"diversity": -1},
        {"method": "random"},
    ],
)
def test_options_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"allocate_steps.{next(iter(options))}") as caught:
        make_pass("allocate_steps", options)
    assert caught.value.hint


def test_it_comes_before_observe() -> None:
    passes = list(RECIPES["w8a8"].passes)
    at = [p.name for p in passes].index("observe")
    Recipe("fine", "", (*passes[:at], AllocateSteps(), *passes[at:]))
    with pytest.raises(RecipeError, match="allocate_steps must come before"):
        Recipe("late", "", (*passes[: at + 1], AllocateSteps(), *passes[at + 1 :]))


def test_a_whole_batch_counts_where_it_is_written_in(context: Context) -> None:
    program = tiny_program(steps=5)
    for value in program.graph.inputs:
        value.shape = ir.Shape([3, *list(value.shape or ())[1:]])
    assert AllocateSteps(share=1.0).run(program, context).allocation == (6,) * 5


def test_a_model_without_feature_maps_is_told_to_name_a_value(context: Context) -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    flat (float[batch,1,4,4] sample, int64[batch] timestep) => (float[batch,1,4,4] epsilon) { epsilon = Tanh (sample) }
    """)
    program = program_of(model, shape=(1, 4, 4))
    with pytest.raises(RecipeError, match="no layer of this model reads a feature map") as caught:
        AllocateSteps(method="density").run(program, context)
    assert "allocate_steps.feature" in str(caught.value.hint)
    named = AllocateSteps(method="density", feature="epsilon").run(program, context)
    assert sum(named.allocation) == 6
