"""The Fisher matrix of a block's output: its decomposition, its loss, and what it does to a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.gradients.block_fisher import equal_share, measure_fishers, split
from mezzotint.compiler.gradients.probed_network import ProbedNetwork, gradients
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.rounding.layer_inputs import chosen_latents
from mezzotint.compiler.training.fisher_loss import BlockFisher
from mezzotint.compiler.training.subgraph import cut_out
from mezzotint.compiler.training.units import find_units
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.passes.reconstruct import Reconstruct
from tests.helpers.tiny import context_in, tiny_program

HOST = torch.device("cpu")


def dense(fisher: BlockFisher) -> np.ndarray:
    factors = fisher.factors.numpy().astype(np.float64)
    return np.diag(fisher.rest.numpy().astype(np.float64)) + factors.T @ factors


def test_the_parts_have_the_diagonal_and_the_largest_eigenvectors() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((40, 12)) * rng.uniform(0.2, 3, 12)).astype(np.float32)
    exact = rows.T.astype(np.float64) @ rows / len(rows)
    exact /= np.trace(exact) / 12
    values, vectors = np.linalg.eigh(exact)
    by_chance = values[:-3].sum() / (40 - 3)
    low = (vectors[:, -3:] * (values[-3:] - by_chance)) @ vectors[:, -3:].T
    wanted = low + np.diag(np.diagonal(exact) - np.diagonal(low))
    np.testing.assert_allclose(dense(split(rows, 3, HOST)), wanted, atol=1e-5)
    np.testing.assert_allclose(dense(split(rows, 12, HOST)), exact, atol=1e-5)
    assert np.abs(dense(split(rows, 2, HOST)) - wanted).max() > 0.1
    nothing = split(np.zeros((4, 12), np.float32), 3, HOST)
    assert not dense(nothing).any()


def test_gradients_of_a_diagonal_matrix_leave_nothing_of_low_rank() -> None:
    """Far fewer gradients than elements: the largest of their eigenvalues are large by chance."""
    rows = np.random.default_rng(2).standard_normal((40, 4000)).astype(np.float32)
    fisher = split(rows, 4, HOST)
    assert np.square(fisher.factors.numpy()).sum() < 0.03 * 4000 < 0.1 * 4000 < fisher.rest.numpy().sum()


def test_the_loss_is_the_quadratic_form() -> None:
    rng = np.random.default_rng(1)
    fisher = split(rng.standard_normal((30, 12)).astype(np.float32), 4, HOST)
    difference = rng.standard_normal((5, 3, 4)).astype(np.float32)
    flat = difference.reshape(5, 12).astype(np.float64)
    wanted = np.mean([d @ dense(fisher) @ d for d in flat]) / 12
    assert float(fisher.error(torch.from_numpy(difference))) == pytest.approx(wanted, rel=1e-5)
    even = BlockFisher(torch.ones(12), torch.zeros(0, 12))
    assert float(even.error(torch.from_numpy(difference))) == pytest.approx(float(np.square(flat).mean()), rel=1e-5)


def test_every_call_has_the_same_share() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)
    np.testing.assert_allclose(equal_share(100 * rows), equal_share(rows), rtol=1e-5)
    assert np.square(equal_share(rows)).mean() == pytest.approx(1, rel=1e-5)


def test_it_is_that_of_the_network_and_moves_the_fit(tmp_path: Path) -> None:
    here: Context = context_in(tmp_path, threads=1, samples=2)
    steps = with_options(RECIPES["w8a8"], {"choose_scales.weight_bits": 4}).passes
    program = pipeline.run_passes(tiny_program(), steps, here)
    model = program.require_float_model()
    floats = {name_of(value) for node in model.graph for value in node.outputs}
    unit = next(unit for unit in find_units(program, "layer") if unit.name == "down")
    part = cut_out(program.model, unit.computed, program.signature, floats, unit.name)
    latents = chosen_latents(program, here, 1)
    (found,) = measure_fishers(program, here, part, latents, HOST, rank=2).values()
    network = ProbedNetwork(program, model, HOST, taps=part.targets)
    total = np.zeros(found.rest.shape[0])
    for batch in latents:
        prediction, tapped = network(batch.x, batch.timestep, batch.conditions)
        for output in prediction.flatten():
            total += np.square(gradients(output, tapped, keep=True)[part.targets[0]]).reshape(len(batch.x), -1).sum(0)
    diagonal = np.diagonal(dense(found))
    assert np.mean(diagonal) == pytest.approx(1, rel=1e-4)
    assert np.corrcoef(diagonal, total)[0, 1] > 0.4, "one projection is noisy, but it is of that diagonal"
    common: dict[str, Any] = {"unit": "layer", "iterations": 2, "units": ("down",), "held_out": 0, "calls": 1}
    options: list[dict[str, Any]] = [{}, {"curvature": "fisher"}, {"curvature": "fisher"}]
    plain, one, two = (
        pipeline.run_passes(program, [Reconstruct(**common, **more)], here).training[0] for more in options
    )
    assert one == two and one.start != plain.start
