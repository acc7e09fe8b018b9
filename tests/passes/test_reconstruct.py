"""reconstruct: weights rounded by training keep a layer's outputs better than those rounded to nearest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline, snapshot
from mezzotint.compiler.core.cache import Cache
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.rounding.layer_inputs import chosen_latents
from mezzotint.compiler.rounding.weights import QuantizedWeight, find_weights
from mezzotint.compiler.torch_graph.convert import to_torch
from mezzotint.compiler.training import torch_check
from mezzotint.compiler.training.array_files import ArrayFiles
from mezzotint.compiler.training.block_data import record
from mezzotint.compiler.training.subgraph import cut_out
from mezzotint.compiler.training.unit_batches import Annealing, Batches
from mezzotint.compiler.training.units import find_units, quantizers_of_units
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.passes.reconstruct import Reconstruct
from mezzotint.runtime.progress import DETAIL
from tests.helpers.tiny import TIME_LAYERS, context_in, tiny_program
from tests.passes.test_round_weights import inserted, planned

QUICK: dict[str, Any] = {
    "held_out": 0,
    "unit": "layer",
    "iterations": 20,
    "learning_rate": 0.2,
    "calls": 2,
    "samples": 2,
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The tiny denoiser with weights of 4 bits."""
    steps = with_options(RECIPES["w8a8-steps"], {"choose_scales.weight_bits": 4}).passes
    return pipeline.run_passes(tiny_program(steps=3), steps, context_in(tmp_path_factory.mktemp("program")))


def trained(program: Program, context: Context, **options: Any) -> Program:
    one = replace(context, threads=1)
    return pipeline.run_passes(program, [Reconstruct(**{**QUICK, **options})], one)


def names(passes: Sequence[Pass]) -> list[str]:
    return [step.name for step in passes]


def integers(weight: QuantizedWeight) -> np.ndarray:
    return weight.rows() / weight.scale()[:, None]


def test_one_layer_gets_better_and_the_others_stay(program: Program, context: Context) -> None:
    before = find_weights(program.graph)
    name = next(w.name for w in before if w.readers[0].op_type == "Conv")
    after = trained(program, context, units=(name,))
    assert "1 of 1 units better" in after.history[-1].note
    for old, new in zip(before, find_weights(after.graph), strict=True):
        moved = integers(new) - np.clip(integers(old), -7, 7)
        if new.name == name:
            np.testing.assert_allclose(integers(new), np.rint(integers(new)), atol=1e-4)
            assert np.abs(moved).max() < 1 + 1e-4, "a weight went further than to a neighbour of the float one"
            assert 0 < np.mean(np.rint(integers(old)) != np.rint(integers(new))) < 0.5
            assert np.abs(np.rint(integers(new))).max() <= 7
        else:
            np.testing.assert_array_equal(new.rows(), old.rows())


def test_the_same_training_twice_gives_the_same_weights(program: Program, context: Context) -> None:
    name = find_weights(program.graph)[0].name
    one, two = (trained(program, context, units=(name,), iterations=10) for _ in range(2))
    for a, b in zip(find_weights(one.graph), find_weights(two.graph), strict=True):
        np.testing.assert_array_equal(a.rows(), b.rows())


def test_scales_of_activations_are_learned_with_the_weights(program: Program, context: Context, tmp_path: Path) -> None:
    """Of the unit's own quantizers; a second run takes both from the cache."""
    block = "b1_conv1 .. b1_conv2"
    cached = replace(context, cache=Cache(tmp_path))
    after, again = (
        trained(program, cached, unit="block", units=(block,), iterations=60, scale_shares=0.01) for _ in range(2)
    )
    assert after.training[-1].kept
    old, new = program.require_plan().quantizers, after.require_plan().quantizers
    changed = {site for site, q in new.items() if not np.array_equal(q.scale, old[site].scale)}
    owned, _ = quantizers_of_units(program.graph, find_units(program, "block"), weights=False, activations=True)
    assert 0 < len(changed) <= len(owned[block])
    one, two = ({name: numpy_of(v) for name, v in p.graph.initializers.items()} for p in (after, again))
    np.testing.assert_equal(one, two)


def test_a_window_starts_where_the_one_before_it_ended(program: Program, context: Context) -> None:
    """Trained one by one, in two runs of the pass, they learn the same; roundings of low rank are learned, too."""
    first, second = "down + up", "up + shortcut .. b2_conv2"
    options: dict[str, Any] = {"unit": "block", "window": 2, "low_rank": 3, "scale_shares": 0.01}
    options |= {"learning_rate": 0.05, "regularization": 1.0}
    both = trained(program, context, **options, units=(first, second))
    one = trained(program, context, **options, units=(first,))
    two = trained(one, context, **options, units=(second,))
    alone = trained(program, context, **options, units=(second,))
    assert both.training == two.training and both.training[0].kept
    assert both.training[1].start != alone.training[0].start
    for a, b in zip(find_weights(both.graph), find_weights(two.graph), strict=True):
        np.testing.assert_array_equal(a.rows(), b.rows())
    with pytest.raises(RecipeError, match=r"reconstruct\.behind is start"):
        Reconstruct(window=2, behind="start")


def test_a_fit_that_does_not_help_keeps_the_start(program: Program, context: Context) -> None:
    after = trained(program, context, iterations=1, learning_rate=1e-9, units=(find_weights(program.graph)[0].name,))
    assert "0 of 1 units better; error 100% of the start's" in after.history[-1].note
    for a, b in zip(find_weights(program.graph), find_weights(after.graph), strict=True):
        np.testing.assert_array_equal(a.rows(), b.rows())


def test_what_cannot_work_is_refused(program: Program, context: Context) -> None:
    with pytest.raises(RecipeError, match="matches no unit") as refused:
        trained(program, context, units=("no such*",))
    assert "units are " in str(refused.value.hint)
    with pytest.raises(RecipeError, match=r"reconstruct\.iterations is 0"):
        Reconstruct(iterations=0)
    with pytest.raises(StatsError, match="float graph"):
        Reconstruct().run(tiny_program(steps=3), context)


def test_the_fit_is_in_the_program_and_survives_a_folder(program: Program, context: Context, tmp_path: Path) -> None:
    name = find_weights(program.graph)[0].name
    one = replace(context, threads=1)
    step = Reconstruct(**QUICK, units=(name,))
    pipeline.run_passes(program, [step], one, dump=pipeline.Dump(tmp_path / "texts"))
    assert not list((tmp_path / "texts").glob("*.py")), "code is written where it is asked for"
    after = pipeline.run_passes(program, [step], one, dump=pipeline.Dump(tmp_path / "passes", models=True))
    (written,) = (tmp_path / "passes").glob("*_reconstruct.py")
    code = written.read_text(encoding="utf-8")
    compile(code, "reconstruct.py", "exec")
    assert "def forward(self, sample, timestep):" in code and "epsilon = onnx_Conv(" in code
    (fit,) = after.training
    assert (fit.unit, fit.by) == (name, "reconstruct")
    assert 0 < fit.hard < fit.start and 0 < fit.soft < fit.start
    assert len(fit.losses) == QUICK["iterations"]
    assert fit.losses[0] < 1, "soft weights start nearer than rounded ones"
    snapshot.save_program(after, tmp_path / "saved", [])
    assert snapshot.load_program(tmp_path / "saved")[0].training == after.training


def test_without_torch_it_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = tiny_program(steps=3).deployment
    RECIPES["brecq"].check(deployment)
    monkeypatch.setattr(torch_check, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match="torch, which is not installed"):
        RECIPES["brecq"].check(deployment)


def test_a_weight_that_two_blocks_read_stays_and_is_counted(context: Context) -> None:
    body = """x = Reshape (sample, rows) a = Gemm <transB = 1> (x, w) a_s = Sigmoid (a) b = Gemm <transB = 1> (a_s, w)
        epsilon = Reshape (b, images)"""
    two = inserted(planned(body, {"w": (4, 4)}, ["x", "a_s"], {"w": 0}), context)
    assert " of 1 units better; " in trained(two, context, unit="layer").history[-1].note
    after = trained(two, context, unit="block")
    assert after.history[-1].note == "nothing to train; 1 weights are read by several units and stay; not judged"
    assert not after.training


def test_qdrop_and_inner_losses_change_the_fit_and_not_what_is_measured(program: Program, context: Context) -> None:
    block = {"unit": "block", "units": ("b1_conv1*",)}
    plain, *others = (
        trained(program, context, **block, **options) for options in ({}, {"drop": 0.5}, {"drop": 0.5}, {"inner": 1.0})
    )
    (fit,) = plain.training
    assert fit.unit == "b1_conv1 .. b1_conv2"
    for after in others:
        (other,) = after.training
        assert other.start == pytest.approx(fit.start, 1e-5), "measured with all quantizers, on the block's outputs"
        assert 0 < other.soft < other.start
        assert other.hard != fit.hard and other.losses != fit.losses
    assert others[0].training == others[1].training, "the same elements are dropped again"


def test_calls_are_drawn_as_often_as_the_allocation_says(program: Program, context: Context) -> None:
    allocated = replace(program, allocation=(0, 3, 1))
    latents = chosen_latents(allocated, replace(context, samples=2, batch=1), 3)
    (weight, *_) = find_weights(program.graph)
    (unit,) = (unit for unit in find_units(program, "layer") if unit.name == weight.name)
    floats = {name_of(v) for node in program.require_float_model().graph for v in node.outputs}
    part = cut_out(program.model, unit.computed, program.signature, floats, unit.name)
    with ArrayFiles(context.folder) as files:
        data = record(allocated, context, part, latents, unit.name, lambda: None, files)
        assert [batch.weight for batch in data] == [0, 0, 3, 3, 1, 1]
        batches = Batches(to_torch(part.model), part, program.signature, data, Annealing(1, 1.0, 1.0, 1), 0)
        rng = np.random.default_rng(0)
        drawn = Counter(batches.draw(rng)[0].timestep for _ in range(200))
    first, second, third = program.deployment.timesteps
    assert drawn[first] == 0 and 120 < drawn[second] < 180 and drawn[third] > 20


@pytest.mark.parametrize("options", [{"drop": 1.0}, {"drop": -0.1}, {"inner": -1.0}, {"inner": float("nan")}])
def test_a_probability_or_a_weight_that_is_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=rf"reconstruct\.{next(iter(options))} is "):
        Reconstruct(**options)


def test_the_halves_of_a_split_layer_are_trained_as_one(context: Context) -> None:
    split = with_options(RECIPES["q-diffusion"], {"choose_scales.weight_bits": 4}).passes
    before = pipeline.run_passes(tiny_program(steps=3), split[: names(split).index("reconstruct")], context)
    after = trained(before, context, unit="block", units=("shortcut*",), regularization=30.0, iterations=60)
    assert [unit.unit for unit in after.training] == ["shortcut_part_0 .. b2_conv2"]
    old, new = ({w.name: w for w in find_weights(p.graph)} for p in (before, after))
    halves = [name for name in old if name.startswith("shortcut_part")]
    assert len(halves) == 2
    for name in halves:
        assert 0 < np.mean(np.rint(integers(old[name])) != np.rint(integers(new[name]))) < 0.5


def test_training_that_was_stopped_goes_on_with_the_next_unit(
    program: Program, context: Context, tmp_path: Path
) -> None:
    first, second = (weight.name for weight in find_weights(program.graph)[:2])
    options = {"units": (first, second), "iterations": 20}
    stages: list[str] = []

    def stopping(stage: str, done: int, total: int) -> None:
        stages.append(stage.partition(DETAIL)[0])
        if stages[-1] == f"reconstruct: {second}" and done == total - 10:
            assert " | loss " in stage
            raise KeyboardInterrupt

    def watching(stage: str, done: int, total: int) -> None:
        stages.append(stage.partition(DETAIL)[0])

    cached = replace(context, cache=Cache(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        trained(program, replace(cached, progress=stopping), **options)
    assert f"reconstruct: {first}" in stages
    stages.clear()
    resumed = trained(program, replace(cached, progress=watching), **options)
    assert f"reconstruct: {first}" not in stages and f"reconstruct: {second}" in stages
    stages.clear()
    whole = trained(program, context, **options)
    assert resumed.training == whole.training and whole.training[0].hard < whole.training[0].start
    weights = [find_weights(p.graph) for p in (resumed, whole)]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a.rows(), b.rows())

    trained(program, replace(cached, progress=watching), **options | {"iterations": 3, "units": (first,)})
    assert f"reconstruct: {first}" in stages, "another option trains anew"
    stages.clear()
    trained(program, replace(cached, progress=watching), **options | {"units": (second,)})
    assert f"reconstruct: {second}" in stages, "behind another first unit the second is another"


def test_a_quantized_time_branch_is_trained_first_and_apart(context: Context) -> None:
    steps = with_options(RECIPES["w8a8-time"], {"choose_scales.weight_bits": 4}).passes
    before = pipeline.run_passes(tiny_program(steps=3), steps, context)
    timely = {weight.name for weight in find_weights(before.graph) if weight.name.startswith(("time_", "b1_t", "b2_t"))}
    assert len(timely) == TIME_LAYERS
    after = trained(before, context, unit="block", units=("the time branch", "b1_conv1*"))
    first, second = after.training
    assert (first.unit, second.unit) == ("the time branch", "b1_conv1 .. b1_conv2")
    assert first.hard < first.start
    alone = trained(before, context, unit="block", units=("the time branch",))
    old, time, both = ({w.name: w.rows() for w in find_weights(p.graph)} for p in (before, alone, after))
    assert {name for name in old if not np.array_equal(old[name], time[name])} == timely
    assert all(np.array_equal(time[name], both[name]) for name in timely), (
        "a block trains no weights of the time branch"
    )
