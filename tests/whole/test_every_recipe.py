"""Every named recipe compiles a model that somebody else exported, and what comes out draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mezzotint import compile_model
from mezzotint.bench.pairs import compare
from mezzotint.passes.recipes.catalog import RECIPES
from tests.helpers.models import CONVS, INTEGER, SMALL, THREADS, Compiled

LEAST = 8.0  # dB of epsilon at the recipe's own widths; the weights are random, and there are 16 channels
TIME_LAYERS = 2  # of the model; without tables they are computed
SLOW = {"mixdq": {"assign_bits.splits": 2, "assign_bits.length": 2, "assign_bits.samples": 1}}


@pytest.mark.parametrize("name", RECIPES)
def test_it_compiles_and_draws(hand: Compiled, tmp_path: Path, name: str) -> None:
    bundle = compile_model(hand.exported, tmp_path / "bundle", recipe=name, settings=SLOW.get(name), **SMALL)

    recipe = RECIPES[name]
    assert [record.name for record in bundle.manifest.history] == [p.name for p in recipe.passes]
    found = compare(bundle, hand.exported, 2, threads=THREADS)
    assert np.isfinite(found.quantized_images).all()
    assert found.sqnr.pooled() > LEAST
    kernels = bundle.manifest.kernels
    if recipe.islands == ("first", "last"):
        tables = "freeze_time" in [p.name for p in recipe.passes]
        assert kernels.integer == INTEGER + (0 if tables else TIME_LAYERS)
    else:  # all four convolutions are next to an end
        assert (kernels.integer, kernels.floating) == (0, CONVS)
