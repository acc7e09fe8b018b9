"""step_scales: tables for what moves with the timestep, and for nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.formats import INT8, UINT8, scale_for_range
from mezzotint.compiler.core.pipeline import Context, Recipe
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.core.stats import Stats, Summary
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.group_steps import GroupSteps
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.passes.step_scales import StepScales
from tests.helpers.tiny import tiny_program

DRIFT = (10.0, 9.0, 2.0, 1.0)
GROUPS = (0, 0, 1, 1)
WEIGHT = Site("w")


def summary_of(scale: float, seed: int) -> Summary:
    made = Summary()
    made.add((np.random.default_rng(seed).uniform(-1.0, 2.0, 4000) * scale).astype(np.float32))
    return made


@pytest.fixture
def planned() -> Program:
    """Two activations, one of which shrinks along the trajectory, and a weight; static quantizers for all."""
    calls = len(DRIFT)
    summaries = {("moves", k): summary_of(DRIFT[k], k) for k in range(calls)}
    summaries |= {("stays", k): summary_of(3.0, k) for k in range(calls)}
    stats = Stats("d", calls, calls, summaries)
    quantizers: dict[Site, Quantizer] = {}
    for name in ("moves", "stays"):
        whole = stats.summary(name)
        assert whole is not None
        quantizers[Site(name)] = Quantizer(UINT8, *scale_for_range(whole.low, whole.high, UINT8), "choose_scales")
    quantizers[WEIGHT] = Quantizer(INT8, *scale_for_range([-1.0, -2.0], [1.0, 2.0], INT8), "choose_scales", axis=0)
    return replace(tiny_program(steps=calls), stats=stats, plan=Plan(quantizers, {"a": "b"}, GROUPS), frozen=(0,))


def after(step: StepScales, program: Program, context: Context) -> Plan:
    plan = step.run(program, context).plan
    assert plan is not None
    return plan


def check_covers(program: Program, quantizer: Quantizer, factor: float = 1.0) -> None:
    """Each row reaches as far as what its calls saw, within half a step, and not further than one step."""
    assert program.stats is not None
    for row in range(max(GROUPS) + 1):
        seen = [program.stats.summaries["moves", k] for k, g in enumerate(GROUPS) if g == row]
        step, zero = float(quantizer.scale[row]) * factor, int(quantizer.zero_point[row])
        low, high = (UINT8.qmin - zero) * step, (UINT8.qmax - zero) * step
        assert abs(low - min(s.low for s in seen)) <= 0.51 * step
        assert abs(high - max(s.high for s in seen)) <= 0.51 * step


def test_what_moves_gets_a_row_for_each_group(planned: Program, context: Context) -> None:
    quantizer = after(StepScales(activations="minmax"), planned, context).quantizers[Site("moves")]
    assert quantizer.table
    assert quantizer.by == "step_scales"
    assert (quantizer.scale.shape, quantizer.zero_point.shape) == ((2,), (2,))
    assert quantizer.scale.dtype == np.float32
    assert quantizer.zero_point.dtype == np.uint8
    check_covers(planned, quantizer)
    with pytest.raises(AssertionError):
        check_covers(planned, quantizer, factor=1.01)


def test_a_shared_zero_point_reaches_as_far(planned: Program, context: Context) -> None:
    """Both groups reach from -1 to 2 times their scale, so that one zero point serves both as well as two."""
    step = StepScales(activations="minmax", zero_point="constant")
    quantizer = after(step, planned, context).quantizers[Site("moves")]
    assert quantizer.table
    assert quantizer.zero_point.dtype == np.uint8
    assert np.ptp(quantizer.zero_point) == 0
    check_covers(planned, quantizer)
    with pytest.raises(AssertionError):
        check_covers(planned, quantizer, factor=1.01)


def two_sides(first: tuple[float, float], second: tuple[float, float], static: int) -> Program:
    """Two groups with these ranges around a static quantizer with this zero point."""
    rng = np.random.default_rng(0)
    summaries = {}
    for k, (low, high) in enumerate((first, second)):
        made = Summary()
        made.add(rng.uniform(low, high, 4000).astype(np.float32))
        summaries["moves", k] = made
    quantizer = Quantizer(UINT8, np.array(0.1, np.float32), np.array(static, np.uint8), "choose_scales")
    plan = Plan({Site("moves"): quantizer}, groups=(0, 1))
    return replace(tiny_program(steps=2), stats=Stats("d", 2, 2, summaries), plan=plan, frozen=(0,))


@pytest.mark.parametrize(
    ("first", "second", "static"),
    [((0.0, 10.0), (-3.0, 1.0), 0), ((-9.0, 0.0), (-1.0, 0.5), 255), ((0.0, 5.0), (-5.0, 0.0), 128)],
)
def test_a_zero_point_at_the_end_of_the_grid_gives_way(
    first: tuple[float, float], second: tuple[float, float], static: int, context: Context
) -> None:
    """One row reaches to the side on which the static grid, or another row's own, has nothing."""
    program = two_sides(first, second, static)
    step = StepScales(activations="minmax", zero_point="constant", gain=-100.0)
    quantizer = after(step, program, context).quantizers[Site("moves")]
    (zero,) = set(quantizer.zero_point.tolist())
    assert 0 < zero < 255
    assert program.stats is not None
    for call, scale in enumerate(quantizer.scale):
        seen = program.stats.summaries["moves", call]
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        assert (0 - zero - 0.51) * scale <= low and high <= (255 - zero + 0.51) * scale
        reach = max(-low / (zero + 0.5), high / (255 - zero + 0.5))
        assert scale == pytest.approx(reach), "wider than its range needs"


def test_a_table_is_reported_by_its_rows(planned: Program, context: Context) -> None:
    data = after(StepScales(), planned, context).quantizers[Site("moves")].entry(Site("moves"))
    assert (data.rows, data.channels) == (2, 1)
    data = after(StepScales(), planned, context).quantizers[WEIGHT].entry(WEIGHT)
    assert (data.rows, data.channels) == (1, 2)


def test_what_does_not_move_stays_as_it_was(planned: Program, context: Context) -> None:
    assert planned.plan is not None
    plan = after(StepScales(), planned, context)
    for site in (Site("stays"), WEIGHT):
        assert plan.quantizers[site] is planned.plan.quantizers[site]
    assert (plan.groups, plan.islands) == (GROUPS, {"a": "b"})
    assert list(plan.quantizers) == list(planned.plan.quantizers)
    assert StepScales().run(planned, context).note == "1 of 2 activations move with the timestep; 2 rows"


@pytest.mark.parametrize(("gain", "tables"), [(-100.0, {"moves", "stays"}), (0.2, {"moves"}), (100.0, set[str]())])
def test_gain_is_the_threshold(planned: Program, context: Context, gain: float, tables: set[str]) -> None:
    plan = after(StepScales(gain=gain), planned, context)
    assert {site.value for site, q in plan.quantizers.items() if q.table} == tables


def test_a_call_without_a_sample_is_refused(planned: Program, context: Context) -> None:
    """It is no weight, which has no statistics either: without them its table would silently stay static."""
    assert planned.stats is not None
    left = {key: summary for key, summary in planned.stats.summaries.items() if key[1] != 3}
    with pytest.raises(StatsError, match="1 of 4 timesteps were never calibrated"):
        StepScales().run(replace(planned, stats=replace(planned.stats, summaries=left)), context)


def test_one_group_gains_nothing(planned: Program, context: Context) -> None:
    assert planned.plan is not None
    whole = replace(planned, plan=replace(planned.plan, groups=(0,) * len(DRIFT)))
    assert not any(q.table for q in after(StepScales(activations="minmax"), whole, context).quantizers.values())


def test_a_view_of_one_reader_gets_a_table_too(planned: Program, context: Context) -> None:
    assert planned.plan is not None
    own = Site("moves", "reader")
    quantizers = {**planned.plan.quantizers, own: planned.plan.quantizers[Site("moves")]}
    plan = after(StepScales(), replace(planned, plan=replace(planned.plan, quantizers=quantizers)), context)
    assert plan.quantizers[own].table


def learned(program: Program, context: Context, groups: tuple[int, ...], clip_weight: float = 4.0) -> Quantizer:
    """The learned table of what moves, with other rows."""
    assert program.plan is not None
    program = replace(program, plan=replace(program.plan, groups=groups))
    return after(StepScales(source="learned", clip_weight=clip_weight), program, context).quantizers[Site("moves")]


def test_only_what_moves_is_learned(planned: Program, context: Context) -> None:
    assert planned.plan is not None
    stages_seen: list[tuple[str, int, int]] = []
    loud = replace(context, progress=lambda stage, done, total: stages_seen.append((stage, done, total)))
    plan = after(StepScales(source="learned"), planned, loud)
    for site in (Site("stays"), WEIGHT):
        assert plan.quantizers[site] is planned.plan.quantizers[site]
    table = plan.quantizers[Site("moves")]
    assert (table.table, table.by, table.scale.shape) == (True, "step_scales", (2,))
    assert table.scale.dtype == np.float32
    assert table.zero_point.dtype == np.uint8
    stages = [stage for stage, _, _ in stages_seen]
    assert stages[-1] == "step_scales (learning)"
    assert stages_seen[-1][1] == stages_seen[-1][2] > 0


def check_near_the_measured(program: Program, context: Context, factor: float = 1.0) -> None:
    """When clipping costs a thousand times as much, nothing is clipped, and nothing is wider than that takes."""
    each = tuple(range(len(DRIFT)))
    scale = learned(program, context, each, clip_weight=1000.0).scale * factor
    measured = np.array(DRIFT) * 3 / 255
    np.testing.assert_allclose(scale, measured, rtol=0.008)


def test_what_is_learned_is_near_what_was_measured(planned: Program, context: Context) -> None:
    check_near_the_measured(planned, context)
    for wrong in (1.01, 0.99):
        with pytest.raises(AssertionError):
            check_near_the_measured(planned, context, factor=wrong)


def test_calls_that_share_a_row_get_the_widest_range_of_them(planned: Program, context: Context) -> None:
    each = learned(planned, context, tuple(range(len(DRIFT))))
    rows = learned(planned, context, GROUPS)
    low, high = ((q - each.zero_point.astype(int)) * each.scale for q in (UINT8.qmin, UINT8.qmax))
    for row in range(2):
        members = [k for k, g in enumerate(GROUPS) if g == row]
        width = max(high[members]) - min(low[members])
        assert float(rows.scale[row]) * 255 == pytest.approx(width, rel=0.01)


def test_the_seed_and_the_weight_decide_what_is_learned(planned: Program, context: Context) -> None:
    first = learned(planned, context, GROUPS).scale.tobytes()
    assert learned(planned, context, GROUPS).scale.tobytes() == first
    assert learned(planned, replace(context, seed=1), GROUPS).scale.tobytes() != first
    assert learned(planned, context, GROUPS, clip_weight=1.0).scale.tobytes() != first


@pytest.mark.parametrize("clip_weight", [0.5, -1.0, float("nan"), float("inf")])
def test_weights_of_clipping_that_are_refused(clip_weight: float) -> None:
    with pytest.raises(RecipeError, match="clip_weight is"):
        StepScales(clip_weight=clip_weight)


@pytest.mark.parametrize("name", ["tdq", "tfmq"])
def test_recipes_with_a_row_for_every_call(name: str, tiny: Program, context: Context) -> None:
    untrained = [step for step in RECIPES[name].passes if step.name not in ("learn_scales", "reconstruct")]
    done = pipeline.run_passes(tiny, untrained, context)
    assert done.plan is not None
    assert done.plan.groups == (0, 1, 2)
    tables = {site for site, q in done.plan.quantizers.items() if q.table}
    activations = {site for site, q in done.plan.quantizers.items() if q.axis is None}
    assert tables
    assert tables <= activations
    if name == "tfmq":
        assert tables == activations


@pytest.mark.parametrize("percentile", [20.0, 50.0, 101.0])
def test_percentiles_that_are_refused(percentile: float) -> None:
    with pytest.raises(RecipeError, match="percentile is"):
        StepScales(percentile=percentile)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        *(({name: 0}, f"{name} is 0") for name in ("samples", "judges", "calls", "ranked")),
        ({"loss": -0.1}, "loss is -0.1"),
        ({"loss": float("nan")}, "loss is nan"),
    ],
)
def test_trials_that_are_refused(options: dict[str, Any], refusal: str) -> None:
    with pytest.raises(RecipeError, match=refusal):
        StepScales(**{"zero_point": "constant", "decide": "held_out", "islands": (), **options})


def test_a_trial_is_for_the_form_that_it_simulates() -> None:
    settings = {"step_scales.decide": "held_out", "step_scales.islands": list(RECIPES["w8a8-steps"].islands)}
    with pytest.raises(RecipeError, match="knows the lowering constant, and the recipe has integer"):
        with_options(RECIPES["w8a8-steps"], settings).check(tiny_program().deployment)
    passes = RECIPES["w8a8-constant"].passes
    Recipe("whole", "", passes).check(tiny_program().deployment)
    passes = tuple(replace(p, islands=None) if isinstance(p, StepScales) else p for p in passes)
    with pytest.raises(RecipeError, match="the islands among them are not known"):
        Recipe("no islands", "", passes).check(tiny_program().deployment)


def test_only_a_trial_has_islands() -> None:
    """Recipes of bundles from before the trial say nothing of them, and they must still open."""
    name = "step_scales"
    old = with_options(RECIPES["w8a8-steps"], {"insert_qdq.islands": ["mid*"]})
    new = with_options(RECIPES["w8a8-constant"], {"insert_qdq.islands": ["mid*"]})
    assert [p.options()["islands"] for r in (old, new) for p in r.passes if p.name == name] == [None, ["mid*"]]
    assert old.islands == new.islands == ("mid*",)


@pytest.mark.parametrize("missing", ["freeze_time", "observe", "choose_scales", "group_steps"])
def test_orders_that_are_refused(missing: str) -> None:
    passes = (Normalize(), FreezeTime(), Observe(groups=0), ChooseScales(), GroupSteps(), StepScales())
    Recipe("complete", "", passes)
    with pytest.raises(RecipeError):
        Recipe("short", "", tuple(p for p in passes if p.name != missing))


def test_tables_come_before_the_quantizers() -> None:
    passes = [p for p in RECIPES["w8a8-steps"].passes if p.name != "step_scales"]
    with pytest.raises(RecipeError, match="step_scales"):
        Recipe("late", "", (*passes, StepScales()))
