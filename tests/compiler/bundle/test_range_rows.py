"""The ranges that a bundle tells are those of its quantizers, and of what calibration saw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mezzotint.compiler.bundle.range_rows import range_rows
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.formats import INT8, UINT8
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.core.stats import Stats, Summary
from mezzotint.passes.recipes.files import load_recipe


def summary(*values: float) -> Summary:
    found = Summary()
    found.add(np.array(values, np.float32))
    return found


def planned(tiny: Program) -> Program:
    """Three timesteps in two groups: a table, a constant, a weight with two channels."""
    table = Quantizer(UINT8, np.array([0.1, 0.2], np.float32), np.array([100, 128], np.uint8), "t", table=True)
    constant = Quantizer(UINT8, np.array(0.5, np.float32), np.array(0, np.uint8), "c")
    weight = Quantizer(INT8, np.array([0.01, 0.02], np.float32), np.zeros(2, np.int8), "w", axis=0)
    quantizers = {Site("a"): table, Site("b", "reader"): constant, Site("w"): weight}
    summaries = {("a", k): summary(-k, k) for k in (0, 1, 2)} | {("b", 0): summary(1, 2)}
    stats = Stats("", 3, 3, summaries, tiny.deployment.timesteps)
    return replace(tiny, plan=Plan(quantizers, groups=(0, 0, 1)), stats=stats)


def test_each_timestep_has_the_row_of_its_group(tiny: Program) -> None:
    found = range_rows(planned(tiny))
    assert found is not None
    assert found.timesteps.tolist() == list(tiny.deployment.timesteps)
    np.testing.assert_allclose(found.low[0], [-10, -10, -25.6], rtol=1e-6)
    np.testing.assert_allclose(found.high[0], [15.5, 15.5, 25.4], rtol=1e-6)
    np.testing.assert_allclose(found.scale[0], [0.1, 0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(found.high[1], 127.5)
    np.testing.assert_allclose(found.low[2], -127 * 0.02, rtol=1e-6)
    np.testing.assert_allclose(found.scale[2], 0.02, rtol=1e-6)


def test_what_was_not_measured_is_not_a_number(tiny: Program) -> None:
    found = range_rows(planned(tiny))
    assert found is not None
    np.testing.assert_array_equal(found.seen_high[0], [0, 1, 2])
    np.testing.assert_array_equal(found.seen_low[1], [1, np.nan, np.nan])
    assert np.isnan(found.seen_low[2]).all()


def test_calls_that_were_summed_up_together_have_the_same_extremes(tiny: Program) -> None:
    program = planned(tiny)
    stats = Stats("", 1, 3, {("a", 0): summary(-3, 3)}, tiny.deployment.timesteps)
    found = range_rows(replace(program, stats=stats))
    assert found is not None
    assert found.seen_high[0].tolist() == [3, 3, 3]


def test_a_float_program_has_none(tiny: Program) -> None:
    assert range_rows(tiny) is None
    assert range_rows(replace(tiny, plan=Plan())) is None


@pytest.mark.parametrize("recipe", ["w8a8-steps", "w4a8"])
def test_calibrated_ranges_hold_what_was_seen(tiny: Program, context: Context, recipe: str) -> None:
    program = pipeline.run_passes(tiny, load_recipe(recipe).passes, context)
    found = range_rows(program)
    assert found is not None and program.plan is not None
    assert len(found.low) == len(program.plan.quantizers)
    rows = [
        i for i, q in enumerate(program.plan.quantizers.values()) if q.table and not np.isnan(found.seen_low[i]).any()
    ]
    assert rows
    width, seen = found.high[rows] - found.low[rows], found.seen_high[rows] - found.seen_low[rows]
    assert (width > 0.5 * seen).all() and (width < 2 * seen).all()
    assert (np.ptp(found.scale[rows], axis=1) > 0).any()  # or there would be no need for tables
