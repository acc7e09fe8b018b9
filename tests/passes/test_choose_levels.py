"""choose_levels: narrow weights get codebooks, and every pass behind keeps to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline, snapshot
from mezzotint.compiler.core.formats import INT8, Format
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program, Quantizer, Site
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.lowering.codes import coded
from mezzotint.compiler.rounding.level_fits import level_errors
from mezzotint.compiler.rounding.weights import find_weights, layer_name
from mezzotint.passes.choose_levels import ChooseLevels
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.passes.round_weights import RoundWeights
from tests.helpers.tiny import context_in, tiny_program

ONE, THREE = ChooseScales(weight_bits=1), ChooseScales(weight_bits=3)
Chosen = Literal["kmeans", "normal", "float", "log", "affine"]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_in(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def observed(context: Context) -> Program:
    return pipeline.run_passes(tiny_program(), [Normalize(), Observe(channels="inputs")], context)


@pytest.fixture(scope="module")
def inserted(observed: Program, context: Context) -> Program:
    return pipeline.run_passes(observed, [THREE, ChooseLevels(), InsertQdq()], context)


def weights(program: Program) -> dict[str, Quantizer]:
    return {site.value: q for site, q in program.require_plan().quantizers.items() if q.axis is not None}


def error(program: Program) -> float:
    """The summed error of all weights, as choose_levels weights it, relative to the uniform grids'."""
    note = program.history[-1].note
    return float(note.split("error ")[1].partition("%")[0]) / 100


@pytest.mark.parametrize("method", ["kmeans", "normal", "float", "log", "affine"])
def test_each_weight_has_the_levels_of_its_bits(observed: Program, context: Context, method: Chosen) -> None:
    after = pipeline.run_passes(observed, [THREE, ChooseLevels(method)], context)
    assert {q.format for q in weights(after).values()} == {INT8}
    for quantizer in weights(after).values():
        assert quantizer.levels is not None and quantizer.by == "choose_levels" and quantizer.bits == 3
        assert quantizer.levels.shape[-1] == (7 if method == "float" else 8)
        assert quantizer.levels.ndim == (2 if method in ("kmeans", "log", "affine") else 1)
        assert quantizer.entry(Site("w")).levels == quantizer.levels.shape[-1]
    if method == "kmeans":
        assert error(after) < 0.75  # of a uniform grid of 7 points
        shared = pipeline.run_passes(observed, [THREE, ChooseLevels(tables="tensor")], context)
        assert error(after) < error(shared) < 0.95
        assert all(q.levels is not None and q.levels.ndim == 1 for q in weights(shared).values())


@pytest.mark.parametrize("method", ["normal", "kmeans", "affine"])
def test_weights_of_1_bit_have_two_levels(observed: Program, context: Context, method: Chosen) -> None:
    """Signs have the scale mean |w|; levels of their own are no worse, and on average better."""
    after = pipeline.run_passes(observed, [ONE, ChooseLevels(method, weighted=False)], context)
    constants = {name: numpy_of(value) for name, value in observed.graph.initializers.items()}
    better = 0
    for name, quantizer in weights(after).items():
        assert quantizer.levels is not None and quantizer.levels.shape[-1] == 2 and quantizer.bits == 1
        rows = np.moveaxis(constants[name], quantizer.axis or 0, 0).reshape(len(quantizer.scale), -1)
        size = np.abs(rows).mean(axis=1)
        if method == "normal":
            assert quantizer.levels.tolist() == [-64, 64]
            np.testing.assert_allclose(64 * quantizer.scale, size, rtol=1e-5)
        elif method == "kmeans":
            found = level_errors(rows, quantizer.scale, quantizer.grid, np.ones((1, rows.shape[1]), np.float32))
            signs = np.square(np.abs(rows) - size[:, None]).sum(axis=1)
            assert (found < 1.02 * signs).all()  # levels are whole steps of the int8 grid
            better += int((found < 0.97 * signs).sum())
    assert better or method != "kmeans"


def test_vectors_of_1_bit(observed: Program, context: Context) -> None:
    after = pipeline.run_passes(observed, [ONE, ChooseLevels("vectors"), InsertQdq()], context)
    for name, quantizer in weights(after).items():
        assert quantizer.bits == 1 and (quantizer.vectors is None) == (name == "in_w"), "27 inputs: two levels"


def test_one_bit_is_stored_in_one(observed: Program, context: Context) -> None:
    program = pipeline.run_passes(observed, [ONE, ChooseLevels(), InsertQdq()], context)
    after = pipeline.run_passes(program, [RoundWeights(calls=2, samples=2, refits=1)], context)
    on_levels(after)
    for weight in find_weights(after.graph):
        q = np.rint(weight.rows() / weight.scale()[:, None]).astype(np.int8)
        by_code = coded(q, 0)
        assert by_code is not None and by_code.bits == 1 and by_code.table.shape == (len(q), 2)


def test_one_bit_without_levels_is_refused(observed: Program, context: Context) -> None:
    recipe = with_options(RECIPES["gptq"], {"choose_scales.weight_bits": 1})
    with pytest.raises(RecipeError, match="weights of 1 bit have no uniform grid"):
        recipe.check(observed.deployment)
    with_options(RECIPES["ganq"], {"choose_scales.weight_bits": 1}).check(observed.deployment)
    with pytest.raises(RecipeError, match="has 1 bit, and no levels"):
        pipeline.run_passes(observed, [ONE, InsertQdq()], context)
    with pytest.raises(RecipeError, match="have one level each"):
        pipeline.run_passes(observed, [ONE, ChooseLevels("log")], context)


def test_wide_weights_and_mixed_rows_stay(observed: Program, context: Context) -> None:
    plain = pipeline.run_passes(observed, [ChooseScales()], context)
    after = pipeline.run_passes(plain, [ChooseLevels()], context)
    assert after.require_plan().quantizers == plain.require_plan().quantizers
    assert "no weight has 1 to 4 bits" in after.warnings[-1]
    three = pipeline.run_passes(observed, [THREE], context)
    name, quantizer = next(iter(weights(three).items()))
    bits = np.full(quantizer.scale.shape, 3, np.int8)
    mixed = replace(three.require_plan(), quantizers={Site(name): replace(quantizer, row_bits=bits)})
    assert "no weight" in ChooseLevels().run(replace(three, plan=mixed), context).warnings[-1]


def test_what_cannot_be_done_is_refused(observed: Program, context: Context) -> None:
    with pytest.raises(RecipeError, match="has 3 bits, and the float format is e2m1"):
        pipeline.run_passes(observed, [THREE, ChooseLevels("float", form="e2m1")], context)
    plain = pipeline.run_passes(tiny_program(), [Normalize(), Observe(), THREE], context)
    with pytest.raises(StatsError, match="no input was measured by channel"):
        pipeline.run_passes(plain, [ChooseLevels()], context)
    assert all(q.levels is not None for q in weights(ChooseLevels(weighted=False).run(plain, context)).values())


def on_levels(program: Program) -> None:
    plan, seen = program.require_plan(), 0
    for weight in find_weights(program.graph):
        quantizer = plan.of(name_of(weight.value).removesuffix("_rows"), layer_name(weight.readers[0]))
        assert quantizer is not None and quantizer.levels is not None
        np.testing.assert_array_equal(quantizer.scale, weight.scale())
        q = weight.rows() / weight.scale()[:, None]
        tables = np.broadcast_to(quantizer.levels, (len(q), quantizer.levels.shape[-1]))
        np.testing.assert_allclose(np.abs(q[:, :, None] - tables[:, None]).min(axis=2), 0, atol=1e-4)
        seen += 1
    assert seen > 5


@pytest.mark.parametrize(
    "options",
    [{"refits": 2}, {"method": "comq", "scales": "output"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_rounded_weights_stay_on_their_levels(inserted: Program, context: Context, options: dict[str, Any]) -> None:
    on_levels(inserted)
    after = pipeline.run_passes(inserted, [RoundWeights(calls=2, samples=2, **options)], context)
    on_levels(after)
    assert int(after.history[-1].note.split("outputs ")[1].partition("%")[0]) < 90  # of nearest's error
    old, new = weights(inserted), weights(after)
    refitted = [not np.array_equal(old[n].levels, new[n].levels) for n in old]  # type: ignore[arg-type]
    assert any(refitted) == ("refits" in options)


def test_pairs_of_inputs_are_rounded_together(observed: Program, context: Context, tmp_path: Path) -> None:
    chosen = ChooseLevels("vectors")
    program = pipeline.run_passes(observed, [THREE, chosen, InsertQdq()], context)
    after = pipeline.run_passes(program, [RoundWeights(calls=2, samples=2)], context)
    assert int(after.history[-1].note.split("outputs ")[1].partition("%")[0]) < 90
    for current in (program, after):
        for weight in find_weights(current.graph):
            planned = current.require_plan().of(name_of(weight.value).removesuffix("_rows"))
            assert planned is not None and planned.vectors is not None and planned.vectors.shape == (64, 2)
            pairs = np.rint(weight.rows() / weight.scale()[:, None]).astype(int).reshape(-1, 2)
            assert {tuple(pair) for pair in pairs.tolist()} <= {tuple(pair) for pair in planned.vectors.tolist()}
    with pytest.raises(RecipeError, match="comq rounds no vectors"):
        pipeline.run_passes(program, [RoundWeights(calls=2, samples=2, method="comq")], context)
    with pytest.raises(RecipeError, match="has more than 8 bits"):
        pipeline.run_passes(observed, [THREE, ChooseLevels("vectors", size=4)], context)
    snapshot.save_program(program, tmp_path)
    loaded, _ = snapshot.load_program(tmp_path)
    for name, quantizer in weights(program).items():
        np.testing.assert_array_equal(quantizer.vectors, weights(loaded)[name].vectors)
        assert quantizer.bits == 3
        # The first layer has 27 inputs.
        assert quantizer.entry(Site(name)).vectors == (None if name == "in_w" else (64, 2))


@pytest.mark.parametrize("nested", [False, True])
def test_pyramids_are_one_table_for_all_weights(observed: Program, context: Context, nested: bool) -> None:
    chosen = ChooseLevels("pyramid", size=4, nested=nested)
    program = pipeline.run_passes(observed, [ChooseScales(weight_bits=2), chosen, InsertQdq()], context)
    after = pipeline.run_passes(program, [RoundWeights(calls=2, samples=2)], context) if nested else program
    if nested:
        assert int(after.history[-1].note.split("outputs ")[1].partition("%")[0]) < 95
    rounded = 0
    for weight in find_weights(after.graph):
        planned = after.require_plan().of(name_of(weight.value).removesuffix("_rows"))
        assert planned is not None and planned.vectors is not None and planned.bits == 2
        q = np.rint(weight.rows() / weight.scale()[:, None] / 31).astype(int)
        sums = set(np.abs(q).reshape(-1, 4).sum(axis=1).tolist())
        assert sums <= ({0, 2, 4} if nested else {4}) and 4 in sums
        rounded += 1
    assert rounded > 5


def test_snapshots_keep_the_levels(inserted: Program, tmp_path: Path) -> None:
    snapshot.save_program(inserted, tmp_path)
    loaded, _ = snapshot.load_program(tmp_path)
    for name, quantizer in weights(inserted).items():
        np.testing.assert_array_equal(quantizer.levels, weights(loaded)[name].levels)


def test_a_raised_scale_makes_the_levels_coarser() -> None:
    scale, zero = np.array([0.5, 0.25], np.float32), np.zeros(2, np.int8)
    levels = np.array([-100, -10, 0, 60], np.int8)
    quantizer = Quantizer(Format(8, signed=True, symmetric=True), scale, zero, "test", axis=0, levels=levels)
    raised = quantizer.raised(np.array([0.5, 1.0], np.float32))
    assert raised.levels is not None and raised.levels.tolist() == [[-100, -10, 0, 60], [-25, -2, 0, 15]]
