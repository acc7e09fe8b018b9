"""learn_scales: scales and zero points that are trained keep the outputs of a unit better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.cache import Cache
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError, RecipeError, StatsError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.training import torch_check
from mezzotint.compiler.training.unit_batches import Batches
from mezzotint.compiler.training.units import find_units, quantizers_of_units
from mezzotint.passes.learn_scales import LearnScales
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from tests.helpers.tiny import context_in, tiny_program
from tests.passes.test_round_weights import sqnr

QUICK: dict[str, Any] = {"held_out": 0, "iterations": 25, "learning_rate": 2e-2, "calls": 3, "samples": 4, "batch": 4}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Program]:
    """The tiny denoiser by a recipe, with activations of 4 bits or weights of 3."""

    @cache
    def program_by(recipe: str, narrow: str = "activations") -> Program:
        context = context_in(tmp_path_factory.mktemp("program"))
        options: dict[str, Any] = {"choose_scales.activation_bits": 4}
        if narrow == "weights":
            options = {"choose_scales.weight_bits": 3, "choose_scales.weights": "minmax"}
        steps = with_options(RECIPES[recipe], options).passes
        return pipeline.run_passes(tiny_program(steps=3), steps, context)

    return program_by


@pytest.fixture
def program(compiled: Callable[..., Program]) -> Program:
    return compiled("w8a8")


def trained(program: Program, context: Context, **options: Any) -> Program:
    return pipeline.run_passes(program, [LearnScales(**{**QUICK, **options})], replace(context, threads=1))


def constants(program: Program) -> dict[str, Any]:
    return {name: numpy_of(value) for name, value in program.graph.initializers.items()}


def moved(before: Program, after: Program) -> set[str]:
    """The constants that changed."""
    old, new = constants(before), constants(after)
    assert old.keys() == new.keys()
    return {name for name in old if not np.array_equal(old[name], new[name])}


def test_epsilon_is_nearer_to_the_float_one(program: Program, context: Context) -> None:
    """On latents that the pass did not see."""
    after = trained(program, context, through="network")
    assert after.history[-1].note.startswith("1 of 1 units better; error ")
    assert sqnr(after, context) > sqnr(program, context) + 1
    (fit,) = after.training
    assert (fit.unit, fit.by, len(fit.losses)) == ("the network", "learn_scales", QUICK["iterations"])
    assert 0 < fit.hard < 0.8 * fit.start


def test_one_block_gets_better_and_the_others_stay(program: Program, context: Context) -> None:
    units = find_units(program, "block")
    owned, _ = quantizers_of_units(program.graph, units, weights=False, activations=True)
    name = max(owned, key=lambda unit: len(owned[unit]))
    after = trained(program, context, units=(name,), iterations=10)
    assert after.history[-1].note.startswith("1 of 1 units better")
    own = {v.name for node in program.graph if node.name in owned[name] for v in node.inputs[1:] if v is not None}
    assert len(moved(program, after)) > 0 and moved(program, after) <= own
    again = trained(program, context, units=(name,), iterations=10)
    assert moved(after, again) == set(), "the same training twice gives the same bytes"
    inner = trained(program, context, units=(name,), iterations=10, inner=1.0)
    assert inner.training[0].start == after.training[0].start, "the errors inside are no part of what is judged"
    assert inner.training[0].losses != after.training[0].losses


def test_what_the_cache_has_is_not_trained_again(program: Program, context: Context, tmp_path: Path) -> None:
    seen: list[str] = []
    cached = replace(context, cache=Cache(tmp_path / "cache"), progress=lambda label, done, total: seen.append(label))
    name = find_units(program, "layer")[-1].name
    first = trained(program, cached, through="layer", units=(name,), iterations=3)
    assert sum(name in label for label in seen) == 3 + 2 * QUICK["calls"]
    seen.clear()
    second = trained(program, cached, through="layer", units=(name,), iterations=3)
    assert not any(name in label for label in seen)
    assert moved(first, second) == set() and second.training == first.training
    assert moved(program, second), "the fit was kept, and is better than the start"
    trained(program, cached, through="layer", units=(name,), iterations=2)
    assert any(name in label for label in seen), "other options are another entry"


def test_rows_that_no_call_uses_stay(compiled: Callable[..., Program], context: Context) -> None:
    program = compiled("w8a8-steps")
    after = trained(program, context, through="network", calls=1, learning_rate=5e-2)
    tables = [name for name in moved(program, after) if constants(program)[name].ndim == 2]
    assert "1 of 1 units better" in after.history[-1].note and tables
    (used,) = {program.require_plan().groups[0]}
    for name in tables:
        rows = np.any(constants(program)[name] != constants(after)[name], axis=1)
        assert rows[used] and not np.any(np.delete(rows, used))


def test_a_network_of_the_timestep_moves_rows_of_calls_that_were_not_recorded(
    compiled: Callable[..., Program], context: Context
) -> None:
    program = compiled("w8a8-steps")
    after = trained(program, context, through="network", form="network", calls=1)
    assert "1 of 1 units better" in after.history[-1].note
    tables = [name for name in moved(program, after) if name.endswith("scales_table")]
    assert len(tables) == 2 and all(
        np.all(np.any(constants(program)[n] != constants(after)[n], axis=1)) for n in tables
    )


def test_weights_alone_and_both(compiled: Callable[..., Program], context: Context) -> None:
    program = compiled("w8a8", "weights")
    weights = trained(program, context, through="network", what="weights")
    scales = {site for site, q in weights.require_plan().quantizers.items() if q.by == "learn_scales"}
    assert scales and all(weights.require_plan().quantizers[site].format.signed for site in scales)
    both = trained(program, context, through="network", what="both")
    assert {q.format.signed for q in both.require_plan().quantizers.values() if q.by == "learn_scales"} == {True, False}
    assert both.training[0].hard < 0.9 * both.training[0].start


def test_weights_that_move_too_are_nearer_than_those_rounded_anew(
    compiled: Callable[..., Program], context: Context, tmp_path: Path
) -> None:
    """Block behind block, on the grids of their learned scales; a second run takes all of it from the cache."""
    program, cached = compiled("w8a8", "weights"), replace(context, cache=Cache(tmp_path / "cache"))
    fixed = trained(program, context, what="both")
    moving, again = (trained(program, cached, what="both", weight_steps=1e-2) for _ in range(2))
    assert sqnr(moving, context) > sqnr(fixed, context) + 1 > sqnr(program, context) + 1
    further = []
    for old, new in zip(find_weights(program.graph), find_weights(moving.graph), strict=True):
        integers = new.rows() / new.scale()[:, None]
        np.testing.assert_allclose(integers, np.rint(integers), atol=1e-4)
        assert np.abs(integers).max() < 3.01
        further.append(np.abs(new.rows() - old.rows()) > 0.51 * new.scale()[:, None])
    assert any(map(np.any, further)), "a weight has another integer than the nearest of its scale"
    assert again.training == moving.training and moved(moving, again) == set()


def test_a_step_takes_its_samples_from_several_calls(
    compiled: Callable[..., Program], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a single step moves several rows of a table."""
    calls: list[tuple[Any, int]] = []

    def counted(batches: Any, batch: Any, samples: slice, *rest: Any) -> Any:
        if batches._graph.module.training:
            calls.append((batch.timestep, len(range(*samples.indices(batch.samples)))))
        return unmixed(batches, batch, samples, *rest)

    unmixed = Batches._call
    monkeypatch.setattr(Batches, "_call", counted)
    program = compiled("w8a8-steps")
    for mixed in (1, 2):
        calls.clear()
        trained(program, context, through="network", mixed=mixed, iterations=4, batch=2)
        assert [count for _, count in calls] == [2 // mixed] * 4 * mixed
    assert any(a[0] != b[0] for a, b in zip(calls[::2], calls[1::2], strict=True))


@pytest.mark.parametrize(("recipe", "options"), [("w8a8", {"zero_points": False}), ("w8a8-constant", {})])
def test_zero_points_stay_where_asked_and_where_all_rows_have_one(
    compiled: Callable[..., Program], context: Context, recipe: str, options: dict[str, Any]
) -> None:
    program = compiled(recipe)
    after = trained(program, context, through="network", **options)
    for site, old in program.require_plan().quantizers.items():
        np.testing.assert_array_equal(after.require_plan().quantizers[site].zero_point, old.zero_point)
    assert moved(program, after)


def test_quantizers_that_several_units_read_stay_and_are_counted(program: Program, context: Context) -> None:
    """Query, key and value read one quantizer: by layers it stays, by blocks it belongs to the block."""
    layers, left = quantizers_of_units(program.graph, find_units(program, "layer"), weights=False, activations=True)
    blocks, none = quantizers_of_units(program.graph, find_units(program, "block"), weights=False, activations=True)
    whole, rest = quantizers_of_units(program.graph, find_units(program, "network"), weights=False, activations=True)
    assert left > none >= rest == 0
    assert sum(map(len, layers.values())) + left == sum(map(len, whole.values()))
    name = find_units(program, "layer")[0].name
    after = trained(program, context, through="layer", units=(name,), iterations=2)
    assert f"{left} quantizers belong to no single unit and stay" in after.history[-1].note
    assert sum(map(len, blocks.values())) > sum(map(len, layers.values()))


def test_a_fit_that_does_not_help_keeps_the_start(program: Program, context: Context) -> None:
    after = trained(program, context, through="network", iterations=1, learning_rate=1e-9)
    assert "error 100% of the start's" in after.history[-1].note
    assert len(after.training) == 1
    wild = trained(program, context, through="network", iterations=2, learning_rate=3.0)
    assert "0 of 1 units better" in wild.history[-1].note and moved(program, wild) == set()


def test_what_cannot_work_is_refused(program: Program, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="matches no unit"):
        trained(program, context, units=("no such*",))
    with pytest.raises(RecipeError, match=r"learn_scales\.iterations is 0"):
        LearnScales(iterations=0)
    with pytest.raises(RecipeError, match=r"learn_scales\.through is network"):
        LearnScales(through="network", units=("conv*",))
    with pytest.raises(RecipeError, match=r"learn_scales\.inner is -1"):
        LearnScales(inner=-1.0)
    with pytest.raises(RecipeError, match=r"learn_scales\.weight_steps moves weights"):
        LearnScales(weight_steps=1e-2)
    with pytest.raises(RecipeError, match="weights have no tables"):
        LearnScales(form="network", what="weights")
    with pytest.raises(RecipeError, match="the plan has no tables"):
        trained(program, context, form="network")
    with pytest.raises(StatsError, match="float graph"):
        LearnScales().run(tiny_program(steps=3), context)
    with pytest.raises(PassError, match=r"the loss is .* at iteration"):
        trained(program, context, through="network", learning_rate=1e6)
    LearnScales().check((), program.deployment)
    monkeypatch.setattr(torch_check, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match="torch, which is not installed"):
        LearnScales().check((), program.deployment)
