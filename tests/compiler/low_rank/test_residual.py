"""Branches of low rank: the best of their rank for what the rounding left, under the inputs and their noise."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.low_rank.residual import Branch, FitWeighting, LayerMetric, SplitWeight, _Fit, alternated
from mezzotint.runtime.arrays import Doubles, Floats

ROWS, INPUTS, RANK = 7, 12, 2


def weight() -> Floats:
    rng = np.random.default_rng(3)
    return (rng.standard_normal((ROWS, INPUTS)) @ np.diag(np.geomspace(3, 0.1, INPUTS))).astype(np.float32)


def gram() -> Doubles:
    rng = np.random.default_rng(4)
    columns = np.diag(np.geomspace(0.2, 5, INPUTS)) @ rng.standard_normal((INPUTS, 40))
    return columns @ columns.T


def on_grid(rows: Floats) -> Floats:
    scale = np.abs(rows).max(axis=1, keepdims=True) / 3
    return np.asarray(np.rint(rows / scale) * scale, np.float32)


def error(branch: Doubles, rounded: Floats, noise: float) -> float:
    """From the definition: over inputs X with X X^T = H, the residual reads them with noise, the branch does not."""
    left = weight() - rounded - branch
    return float(np.trace(left @ gram() @ left.T) + noise * np.sum((weight() - branch) ** 2))


def fitted(rounded: Floats, noise: float, weighting: FitWeighting = "output") -> Branch:
    metric = LayerMetric(gram(), noise, weighting)
    return _Fit(weight(), metric, half=False).fitted(weight() - rounded, None, RANK)


def product(branch: Branch) -> Doubles:
    return branch.up.astype(np.float64) @ branch.down.astype(np.float64)


@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("start", ["nothing", "rounded"])
def test_no_branch_of_the_rank_is_better(noise: float, start: str) -> None:
    rounded = np.zeros_like(weight()) if start == "nothing" else on_grid(weight())
    branch = fitted(rounded, noise)
    best = error(product(branch), rounded, noise)
    metric = gram() + noise * np.eye(INPUTS)
    root = np.linalg.cholesky(metric)
    target = ((weight() - rounded) @ gram() + noise * weight()) @ np.linalg.inv(metric)
    u, s, v = np.linalg.svd(target @ root)
    assert best == pytest.approx(error((u[:, :RANK] * s[:RANK]) @ v[:RANK] @ np.linalg.inv(root), rounded, noise))
    rng = np.random.default_rng(0)
    for _ in range(50):
        moved = Branch(
            *(part + 1e-2 * rng.standard_normal(part.shape).astype(np.float32) for part in (branch.up, branch.down))
        )
        assert error(product(moved), rounded, noise) > best
    u, s, v = np.linalg.svd(weight() - rounded)
    assert error((u[:, :RANK] * s[:RANK]) @ v[:RANK], rounded, noise) > 1.02 * best  # blind to the inputs


def test_weightings_that_see_less_of_the_inputs_are_singular_vectors() -> None:
    zero = np.zeros_like(weight())
    u, s, v = np.linalg.svd(weight().astype(np.float64))
    assert product(fitted(zero, 3.0, "none")) == pytest.approx((u[:, :RANK] * s[:RANK]) @ v[:RANK], abs=1e-5)
    length = np.sqrt(np.diagonal(gram()))
    u, s, v = np.linalg.svd(weight() * length)
    assert product(fitted(zero, 0.0, "inputs")) == pytest.approx((u[:, :RANK] * s[:RANK]) @ v[:RANK] / length, abs=1e-5)


@pytest.mark.parametrize("weighting", ["output", "inputs", "none"])
def test_more_outputs_than_inputs_make_no_difference(weighting: FitWeighting) -> None:
    """The same branch, from the eigenproblem of the other side."""
    tall = np.tile(weight(), (3, 1)) + 0.1 * np.random.default_rng(5).standard_normal((3 * ROWS, INPUTS))
    for noise in (0.0, 3.0):
        fit = _Fit(tall.astype(np.float32), LayerMetric(gram(), noise, weighting), half=False)
        right = product(fit.fitted(tall, None, RANK))
        metric = gram() if weighting == "output" else np.diag(np.diagonal(gram()))
        metric = np.eye(INPUTS) if weighting == "none" else metric + noise * np.eye(INPUTS)
        u = np.linalg.svd(tall @ np.linalg.cholesky(metric))[0][:, :RANK]
        assert right == pytest.approx(u @ u.T @ tall, abs=3e-3)  # a ridge of 1e-6


def split(noise: float = 0.0, iterations: int = 20, *, half: bool = False, rank: int = RANK) -> SplitWeight:
    return alternated(weight(), LayerMetric(gram(), noise), rank, on_grid, iterations, half=half)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_turns_lower_the_error_that_they_report(noise: float) -> None:
    once, often = split(noise, 1), split(noise)
    assert once.branch is not None and often.branch is not None
    power = error(np.zeros((ROWS, INPUTS)), np.zeros_like(weight()), 0.0)
    for found in (once, often):
        assert found.branch is not None
        residual = weight() - found.branch.product
        assert found.error == pytest.approx(error(product(found.branch), on_grid(residual), noise) / power, rel=1e-4)
    assert often.error < 0.97 * once.error < 0.5 * once.whole and 1 < often.iterations <= 20
    assert once.whole == pytest.approx(error(np.zeros((ROWS, INPUTS)), on_grid(weight()), noise) / power, rel=1e-4)


def test_halves_are_exact_and_the_residual_makes_up_for_them() -> None:
    found = split(half=True)
    assert found.branch is not None
    for part in (found.branch.up, found.branch.down):
        assert np.array_equal(part, part.astype(np.float16))
    assert found.error < 1.1 * split().error


def test_a_weight_on_its_grid_stays_whole() -> None:
    rows = on_grid(weight())
    found = alternated(rows, LayerMetric(gram(), 0.0), RANK, on_grid, 20, half=False)
    assert found.branch is None and found.error == found.whole < 1e-9
