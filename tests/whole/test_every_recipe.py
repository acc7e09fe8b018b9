"""Every list of passes that a named recipe has compiles a model of opset 13 that an older exporter wrote, and it
draws. Recipes that differ in options alone are one list: the tests of its passes go through their options."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mezzotint import compile_model
from mezzotint.bench.pairs import compare
from mezzotint.passes.recipes.catalog import RECIPES
from tests.helpers.models import SMALL, THREADS
from tests.helpers.old_unet import OLD_CONVS, OLD_NORMS, old_unet

LEAST = 8.0  # dB of epsilon at the recipe's own widths; the weights are random, and there are 8 channels
BARS = {"magnitude-prune": 4.0, "onebit": 1.0}  # what others are compared with; signs, before they are trained
INTEGER = 4  # convolutions that are next to neither end
ITERATIONS = 3
FEW = {
    "reconstruct": {"iterations": ITERATIONS, "samples": 2, "calls": 1},
    "learn_scales": {"iterations": ITERATIONS, "samples": 2, "calls": 1},
    "distill": {"iterations": ITERATIONS, "samples": 2, "held_out": 1, "checks": 1},
}
SLOW = {
    "mixdq": {"assign_bits.splits": 2, "assign_bits.length": 2, "assign_bits.samples": 1},
}


LISTS = {(*(step.name for step in recipe.passes), recipe.target): name for name, recipe in reversed(RECIPES.items())}
"""The first recipe of each list of passes for a target."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return old_unet(tmp_path_factory.mktemp("old") / "old.onnx")


@pytest.mark.parametrize("name", reversed(LISTS.values()))
def test_it_compiles_and_draws(source: Path, tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    training = FEW.keys() & {step.name for step in recipe.passes}
    settings = {f"{step}.{option}": value for step in training for option, value in FEW[step].items()}
    settings |= SLOW.get(name, {})
    bundle = compile_model(source, tmp_path / "bundle", recipe=name, settings=settings, **SMALL)

    assert [record.name for record in bundle.manifest.history] == [p.name for p in recipe.passes]
    history = {record.name: record.note for record in bundle.manifest.history}
    assert history["normalize"].startswith("opset 13 raised to 18, 3 nodes without effect removed")
    if "lower_norms" in history:
        assert history["lower_norms"].startswith(f"{OLD_NORMS} ")
    assert {unit.by for unit in bundle.manifest.training} == training
    assert all(len(unit.losses) == ITERATIONS for unit in bundle.manifest.training)
    found = compare(bundle, source, 2, threads=THREADS)
    assert np.isfinite(found.quantized_images).all()
    assert found.sqnr.pooled() > BARS.get(name, LEAST)
    if name == "magnitude-prune":  # below the decibels of --min-sqnr, and nothing is quantized
        assert "What helps: a smaller share of pruned weights" in str(
            getattr(bundle.manifest.acceptance, "warning", "")
        )
    kernels = bundle.manifest.kernels
    assert kernels.integer + kernels.floating >= OLD_CONVS
    if any(step.name == "insert_qdq" for step in recipe.passes) and recipe.target == "onnxruntime":
        assert kernels.integer >= INTEGER
