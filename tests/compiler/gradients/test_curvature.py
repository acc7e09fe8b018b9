"""Gradients of the prediction and the matrices made of them: against Jacobians, autograd and sums written out."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError, RecipeError
from mezzotint.compiler.gradients.curvature import (
    GuidedGram,
    SampleGradients,
    at_positions,
    groups_of_rows,
    weight_gradient,
)
from mezzotint.compiler.gradients.probed_network import ProbedNetwork, gradients, project
from mezzotint.compiler.gradients.stage_curvature import gather_weighted
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rounding.gram import Unfold
from mezzotint.compiler.rounding.layer_inputs import Inputs, chosen_latents
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.training import torch_check
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.passes.round_weights import RoundWeights
from mezzotint.runtime.sampling.deployment import Deployment
from tests.helpers.tiny import context_in, tiny_program

HOST = torch.device("cpu")


def probed(program: Program, *taps: str, weights: tuple[str, ...]) -> ProbedNetwork:
    return ProbedNetwork(program, program.model, HOST, taps=taps, weights=weights)


def latents(rows: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((rows, 1, 8, 8)).astype(np.float32)


def test_gradients_are_those_of_a_projection_whose_signs_are_independent() -> None:
    """g = J^T v, so E[g g^T] = J^T E[v v^T] J, the Gauss-Newton matrix where E[v v^T] = 1."""
    network = probed(tiny_program(), "gate_raw", weights=("gate_w",))
    prediction, tapped = network(latents(1), 500, {})
    gate = tapped["gate_raw"]
    jacobian = np.stack([gradients(y, {"g": gate}, keep=True)["g"].ravel() for y in prediction.flatten()])
    total = project(prediction, 0, 0, 0, 0)
    v = gradients(total, {"v": prediction}, keep=True)["v"].ravel()
    np.testing.assert_allclose(gradients(total, tapped)["gate_raw"].ravel(), jacobian.T @ v, rtol=1e-3, atol=1e-6)
    signs = [
        gradients(project(prediction, *place), {"v": prediction}, keep=True)["v"].ravel()
        for place in product((0, 1), range(6), range(5), range(10))
    ]
    assert set(np.unique(signs)) == {-1, 1}
    np.testing.assert_allclose(np.cov(np.array(signs).T, bias=True), np.eye(64), atol=0.25)


def test_a_prediction_behind_guidance_weights_its_halves() -> None:
    program = tiny_program()
    plain = probed(program, "down", weights=("down_w",))
    guided = replace(program, deployment=replace(program.deployment, guidance=3.0))
    network = probed(guided, "down", weights=("down_w",))
    x = latents(2)
    prediction, tapped = network(x, 500, {})
    assert network.halves == 2 and prediction.shape[0] == 1
    alone, values = plain(x, 500, {})
    signs = torch.from_numpy(np.ones((1, 1, 8, 8), np.float32))
    both = gradients((prediction * signs).sum(), tapped)["down"]
    each = gradients((alone * signs).sum(), values)["down"]
    np.testing.assert_allclose(both, each * np.array([-2.0, 3.0]).reshape(2, 1, 1, 1), rtol=1e-4, atol=1e-6)


def test_gradients_of_samples_by_the_weight_are_those_of_autograd() -> None:
    program = tiny_program()
    node = next(layer.node for layer in layers(program.graph) if layer.name == "down")
    network = probed(program, "down", "gated", "q", "tokens", weights=("down_w", "q_w", "in_w"))
    prediction, tapped = network(latents(2), 500, {})
    total = project(prediction, 3, 0, 0, 0)
    wanted = gradients(total, dict(network.weights), keep=True)
    found = gradients(total, {"down": tapped["down"], "q": tapped["q"]})
    x = {name: value.detach().numpy() for name, value in tapped.items()}
    unfold = Unfold.of(node, (16, 16, 3, 3))
    parts = [weight_gradient(x["gated"], found["down"], unfold, [row]) for row in range(2)]
    np.testing.assert_allclose((parts[0] + parts[1])[0], wanted["down_w"].reshape(16, -1), rtol=1e-3, atol=1e-5)
    assert not np.allclose(parts[0][0], wanted["down_w"].reshape(16, -1), rtol=1e-3, atol=1e-5)
    linear = weight_gradient(x["tokens"], found["q"], Unfold(), [0, 1])
    np.testing.assert_allclose(linear[0], wanted["q_w"].T, rtol=1e-3, atol=1e-5)


def test_a_convolution_with_groups_has_a_gradient_for_each() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2, 4, 5, 5)).astype(np.float32))
    w = torch.from_numpy(rng.standard_normal((6, 2, 3, 3)).astype(np.float32)).requires_grad_()
    y = functional.conv2d(x, w, stride=2, padding=1, groups=2)
    g = torch.from_numpy(rng.standard_normal(tuple(y.shape)).astype(np.float32))
    (wanted,) = torch.autograd.grad((y * g).sum(), w)
    unfold = Unfold((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 2)
    found = weight_gradient(x.numpy(), g.numpy(), unfold, [0, 1])
    np.testing.assert_allclose(found, wanted.numpy().reshape(2, 3, 18), rtol=1e-4, atol=1e-5)


def test_the_matrices_are_those_sums() -> None:
    rng = np.random.default_rng(1)
    columns, grads = rng.standard_normal((50, 2, 5)), rng.standard_normal((50, 2, 6))
    guided = GuidedGram(2, 3, 5)
    guided.add(columns.astype(np.float32), grads.astype(np.float32))
    for group in range(2):
        for share in range(3):
            rows = range(2 * share, 2 * share + 2)
            each = [(columns[:, group].T * grads[:, group, row] ** 2) @ columns[:, group] for row in rows]
            np.testing.assert_allclose(guided.matrix()[3 * group + share], np.mean(each, axis=0), rtol=1e-4)
    samples = rng.standard_normal((7, 2, 6, 5))
    both = SampleGradients(2, 6, 5, sides=True)
    for sample in samples:
        both.add(sample.astype(np.float32))
    side = both.side()
    assert side is not None and SampleGradients(2, 6, 5, sides=False).side() is None
    np.testing.assert_allclose(both.matrix(), np.einsum("sgra,sgrb->gab", samples, samples), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(side, np.einsum("sgra,sgta->grt", samples, samples), rtol=1e-4, atol=1e-5)


def test_positions_of_gradients_are_those_of_the_inputs() -> None:
    image, tokens = np.arange(2 * 4 * 6).reshape(2, 4, 2, 3), np.arange(2 * 3 * 4).reshape(2, 3, 4)
    chosen = (np.array([0, 1, 1]), np.array([5, 0, 2]))
    unfold = Unfold((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 2)
    found = at_positions(image.astype(np.float32), unfold, chosen)
    np.testing.assert_array_equal(found[0].ravel(), image[0, :, 1, 2])
    np.testing.assert_array_equal(found[2].ravel(), image[1, :, 0, 2])
    assert found.shape == (3, 2, 2)
    rows = at_positions(tokens.astype(np.float32), Unfold(), (np.array([1]), np.array([2])))
    np.testing.assert_array_equal(rows.ravel(), tokens[1, 2])


def test_rows_are_cut_into_equal_groups() -> None:
    assert [groups_of_rows(*pair) for pair in ((128, 4), (6, 4), (7, 4), (1, 4), (9, 100))] == [4, 3, 1, 1, 9]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_in(tmp_path_factory.mktemp("gradients"), threads=1, samples=2)


@pytest.fixture(scope="module")
def quantized(here: Context) -> Program:
    steps = with_options(RECIPES["w8a8"], {"choose_scales.weight_bits": 4}).passes
    return pipeline.run_passes(tiny_program(), steps, here)


def stage_of(program: Program, name: str) -> Inputs:
    floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
    weight = next(weight for weight in find_weights(program.graph) if weight.name == name)
    return Inputs.of(weight, floats, "test")


def test_each_call_has_the_same_share_with_balance(quantized: Program, here: Context) -> None:
    inputs = stage_of(quantized, "down")
    few = chosen_latents(quantized, here, 3)[::2]

    def trace(weighting: Any, balance: bool, batches: Any) -> float:
        numbers: dict[str, Any] = {"row_groups": 4, "probes": 1, "rounded": (), "columns": 10**6}
        found = gather_weighted(
            quantized, here, [inputs], batches, weighting, balance=balance, step=lambda: None, **numbers
        )
        assert (found.side(inputs) is not None) == (weighting == "yaqa")
        return float(np.einsum("gii->", found.gram(inputs)))

    for weighting in ("guided", "yaqa"):
        each = [[trace(weighting, balance, [one]) for one in few] for balance in (True, False)]
        assert np.ptp(each[0]) / np.mean(each[0]) < np.ptp(each[1]) / np.mean(each[1])
        assert trace(weighting, False, few) == pytest.approx(sum(each[1]), rel=1e-4)


@pytest.mark.parametrize("weighting", ["guided", "oac", "yaqa"])
def test_weights_are_rounded_on_their_grids_with_the_same_bytes_twice(
    quantized: Program, here: Context, weighting: Any
) -> None:
    chosen = ("down", "q", "k")
    passes = [RoundWeights(weighting=w, calls=2, layers=chosen) for w in (weighting, weighting, "none")]
    one, two, plain = (find_weights(pipeline.run_passes(quantized, [step], here).graph) for step in passes)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.rows(), b.rows())
        if a.name not in chosen:
            continue
        q = a.rows() / a.scale()[:, None]
        np.testing.assert_allclose(q, np.clip(np.rint(q), -7, 7), atol=1e-5)
    assert any(not np.array_equal(a.rows(), b.rows()) for a, b in zip(one, plain, strict=True))


def test_predictions_that_are_not_finite_are_refused() -> None:
    network = probed(tiny_program(), "down", weights=("down_w",))
    prediction, _ = network(np.full((1, 1, 8, 8), np.nan, np.float32), 500, {})
    with pytest.raises(PassError, match="predicts numbers that are not finite"):
        project(prediction, 0, 0, 0, 0)


def test_a_missing_torch_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = tiny_program().deployment
    monkeypatch.setattr(torch_check, "find_spec", lambda name: None)
    RoundWeights().check((), deployment)
    with pytest.raises(RecipeError, match="takes gradients with torch, which is not installed"):
        RoundWeights(weighting="guided").check((), deployment)


def test_only_a_pass_with_gradients_uses_a_device() -> None:
    assert not RoundWeights().trains_on("cpu") and RoundWeights(weighting="oac").trains_on("cpu")
    assert isinstance(tiny_program().deployment, Deployment)
