"""expand_weights: terms of few bits that are together as good as one of twice as many."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.low_rank.expansion import expanded
from mezzotint.compiler.rounding.weights import find_weights, weight_rows
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.expand_weights import ExpandWeights
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.runtime.arrays import Floats
from tests.conftest import Check
from tests.helpers.tiny import tiny_program


def test_each_term_is_what_the_ones_before_leave() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)
    terms = expanded(rows, 4, "minmax", 3)
    assert np.sum(terms, axis=0) == pytest.approx(rows, abs=1e-6)
    limit = np.abs(rows).max(axis=1, keepdims=True)
    for k, term in enumerate(
        terms[:2]
    ):  # from the definition: rint to 7 steps of the largest left, each 14 times finer
        steps = term / (limit / 7)
        assert steps == pytest.approx(np.rint(steps), abs=1e-3) and np.abs(steps).max() == pytest.approx(7, abs=1e-3)
        left = rows - np.sum(terms[: k + 1], axis=0)
        assert np.abs(left).max() <= limit.max() / 14 * 1.001
        limit = np.abs(left).max(axis=1, keepdims=True)


def test_both_kinds_of_layers_are_expanded(check_golden: Check) -> None:
    after = check_golden(ExpandWeights(weight_bits=3, weights="minmax"), "both_kinds")
    assert after.history[-1].note == "3 weights became 2 of 3 bits each; 2 stay single"


def test_terms_are_rounded_where_the_pass_expected_it(context: Context) -> None:
    before = pipeline.run_passes(tiny_program(), [Normalize()], context)
    passes = [
        ExpandWeights(weights="minmax"),
        Observe(samples=2),
        ChooseScales(weights="minmax", weight_bits=4),
        InsertQdq(),
    ]
    after = pipeline.run_passes(before, passes, context)
    sums: dict[str, Floats] = {}
    for weight in find_weights(after.graph):
        scale = weight.scale()[:, None]
        grid = scale * np.clip(np.rint(weight.rows() / scale), -7, 7)
        if weight.name.endswith("_term_1"):
            sums[weight.name.removesuffix("_term_1")] = sums[weight.name.removesuffix("_term_1")] + grid
        else:
            sums[weight.name] = grid
            assert grid == pytest.approx(weight.rows(), abs=1e-5)  # the first term loses nothing
    assert len(find_weights(after.graph)) == 2 * len(sums) > 20
    for layer in layers(before.graph):
        if layer.name in sums:
            whole = weight_rows(layer.require_weight(), layer.require_weight_axis())
            error = np.linalg.norm(sums[layer.name] - whole) / np.linalg.norm(whole)
            assert error < 0.012  # about 0.08 with one term


@pytest.mark.parametrize("terms", [1, 5])
def test_a_number_of_terms_that_means_nothing(terms: int) -> None:
    with pytest.raises(RecipeError, match=f"expand_weights.terms is {terms}"):
        ExpandWeights(terms=terms)
