"""store_half: what stays in float becomes exact in half precision; what an integer kernel reads does not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass, Recipe
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.lowering.lower import lower
from mezzotint.compiler.lowering.packable import rounded_to_half
from mezzotint.passes import store_half
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.store_half import StoreHalf
from tests.conftest import Check
from tests.helpers.tiny import context_in, tiny_program

ISLANDS = ("first", "last", "up", "down")  # `up` and `down` have weights of 9 kB


def passes(recipe: str) -> list[Pass]:
    return [replace(p, islands=ISLANDS) if isinstance(p, InsertQdq) else p for p in RECIPES[recipe].passes]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The tiny net with tables, in the integer spelling, before this pass."""
    return pipeline.run_passes(tiny_program(), passes("w8a8-steps"), context_in(tmp_path_factory.mktemp("quantized")))


def changed(before: Program, after: Program) -> set[str]:
    pairs = [(n, v, before.graph.initializers[n]) for n, v in after.graph.initializers.items()]
    return {n for n, new, old in pairs if not np.array_equal(numpy_of(new), numpy_of(old))}


def run(program: Program, context: Context) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    x = np.random.default_rng(0).normal(size=(2, *program.shape)).astype(np.float32)
    with Executor(lower(program), context.folder, threads=2) as executor:
        return np.asarray(executor.call(program.signature, x, program.deployment.timesteps[0])["epsilon"])


def test_weights_of_islands_become_half_and_nothing_else(quantized: Program, context: Context) -> None:
    after = pipeline.run_passes(quantized, [StoreHalf()], context)
    moved = changed(quantized, after)
    assert {"up_w", "down_w"} <= moved
    assert not moved & {"b1_w1", "b1_w2", "q_w", "gate_w", "scales_table"}
    for name in moved:
        old, new = (numpy_of(p.graph.initializers[name]) for p in (quantized, after))
        np.testing.assert_array_equal(new, rounded_to_half(old))
    halves = [n for n, v in lower(after).graph.initializers.items() if v.dtype == ir.DataType.FLOAT16]
    assert sorted(halves) == sorted(f"{name}_half" for name in moved)
    assert after.history[-1].note.startswith(f"{len(moved)} constants rounded to half precision, 0 had it already; ")


def test_the_numbers_move_a_little_and_a_planted_error_is_seen(quantized: Program, context: Context) -> None:
    after = pipeline.run_passes(quantized, [StoreHalf()], context)
    want, got = run(quantized, context), run(after, context)
    reach = float(np.abs(want).max())
    assert not np.array_equal(got, want)
    np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * reach)
    weight = after.graph.initializers["up_w"]
    weight.const_value = ir.tensor(numpy_of(weight) * np.float32(1.5), name=name_of(weight))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(run(after, context), want, rtol=0, atol=0.02 * reach)


def test_again_changes_nothing(quantized: Program, context: Context) -> None:
    once = pipeline.run_passes(quantized, [StoreHalf()], context)
    twice = pipeline.run_passes(once, [StoreHalf()], context)
    assert changed(once, twice) == set()
    assert twice.history[-1].note.startswith("0 constants rounded")


@pytest.mark.parametrize(("factor", "why"), [(1e6, "overflow"), (1e-8, "subnormal")])
def test_what_half_does_not_reach_stays_and_is_counted(
    quantized: Program, context: Context, factor: float, why: str
) -> None:
    program = replace(quantized, model=quantized.model.clone())
    weight = program.graph.initializers["up_w"]
    array = numpy_of(weight).copy()
    array[3] *= np.float32(factor)  # one output channel is enough
    weight.const_value = ir.tensor(array, name="up_w")
    after = pipeline.run_passes(program, [StoreHalf()], context)
    assert "up_w" not in changed(program, after), why
    assert "; 1 kept in float32, where half precision would move a row by more than 0.001" in after.history[-1].note


def test_scales_when_asked_for(context: Context, quantized: Program) -> None:
    tables = {n for n, v in quantized.graph.initializers.items() if n.endswith("scales_table")}
    large = {n for n in tables if numpy_of(quantized.graph.initializers[n]).nbytes >= 1024}
    assert large
    after = pipeline.run_passes(quantized, [StoreHalf(scales=True)], context)
    assert large == changed(quantized, after) & tables
    want, got = run(quantized, context), run(after, context)
    np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * float(np.abs(want).max()))


def test_islands_and_factors_but_no_layers(check_golden: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight float constants two are rounded; the factor's tiny value does not count, as its row is long enough."""
    monkeypatch.setattr(store_half, "SMALLEST_SAVING", 4)
    after = check_golden(StoreHalf(), "island")
    assert after.history[-1].note.startswith(
        "2 constants rounded to half precision, 0 had it already; 12 bytes saved; 1"
    )


def test_it_wants_a_quantized_graph() -> None:
    with pytest.raises(RecipeError, match="needs 'qdq'"):
        Recipe("wrong", "", (StoreHalf(),))


@pytest.mark.parametrize("error", [0.0, 1.0, -1.0])
def test_an_error_that_means_nothing_is_refused(error: float) -> None:
    with pytest.raises(RecipeError, match="largest_error is"):
        StoreHalf(largest_error=error)
