"""The entropy of the integers that units read, from histograms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.formats import Format, quantize
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Plan, Site
from mezzotint.compiler.core.stats import Summary
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.training.unit_entropies import entropy_of, entropy_of_integers, ties_by_entropy
from mezzotint.compiler.training.units import find_units
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.reconstruct import Reconstruct
from tests.helpers.tiny import tiny_program


def summary_of(values: np.ndarray) -> Summary:
    summary = Summary()
    summary.add(values.astype(np.float32))
    return summary


def test_a_few_values() -> None:
    """Half of the values at one integer and a quarter at each of two others: 1.5 bits."""
    some = summary_of(np.array([0.0, 0.0, 1.0, 2.0]))
    assert entropy_of_integers(some, 1.0, 3, Format(4)) == pytest.approx(1.5)
    assert entropy_of_integers(some, 1.0, 14, Format(4)) == pytest.approx(1.0), "1 and 2 are beyond the end, at 15"
    assert entropy_of_integers(some, 100.0, 3, Format(4)) == 0
    assert entropy_of_integers(summary_of(np.full(5, 7.0)), 1.0, 0, Format(4)) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_that_of_the_integers(bits: int) -> None:
    values = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    fmt, scale, zero = Format(bits), np.float32(7 / 2**bits), np.array(2 ** (bits - 1), np.uint8)
    _, counts = np.unique(quantize(values, np.asarray(scale), zero, fmt), return_counts=True)
    shares = counts / counts.sum()
    found = entropy_of_integers(summary_of(values), float(scale), int(zero), fmt)
    assert found == pytest.approx(-(shares * np.log2(shares)).sum(), abs=0.01)


def test_units_of_a_network(context: Context) -> None:
    """The first of two units ties them; rows of a table count by their values."""
    program = pipeline.run_passes(tiny_program(steps=2), RECIPES["w8a8-steps"].passes, context)
    units = find_units(program, "layer")
    found = ties_by_entropy(units, program)
    assert found == [entropy_of(unit, program) for unit in units[:-1]] and all(2 < bits < 8 for bits in found)

    plan, stats = program.require_plan(), program.require_stats()
    up = next(unit for unit in units if unit.name == "up")
    quantizer = plan.of("wide", "up")
    assert quantizer is not None and quantizer.axis is None
    wide = replace(quantizer, scale=quantizer.scale * 1e6)
    coarse = replace(program, plan=replace(plan, quantizers={**plan.quantizers, Site("wide", "up"): wide}))
    assert entropy_of(up, coarse) == 0 < entropy_of(up, program)
    assert quantizer.table
    calls = [(stats.summaries["wide", k], row) for k, row in enumerate(plan.groups)]
    bits = [
        entropy_of_integers(summary, float(quantizer.scale[row]), int(quantizer.zero_point[row]), quantizer.format)
        for summary, row in calls
    ]
    assert entropy_of(up, program) == pytest.approx(np.mean(bits))

    bare = replace(program, plan=Plan(), stats=stats)
    with pytest.raises(RecipeError, match="reads quantized activations"):
        ties_by_entropy(units, bare)
    with pytest.raises(StatsError, match="are gone"):
        Reconstruct(joined=1, joined_by="entropy", held_out=0).run(replace(program, stats=None), context)
