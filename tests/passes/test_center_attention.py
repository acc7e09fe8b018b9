"""center_attention: the mean token is gone from what is quantized, the function stays, a loud channel costs nothing."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.errors import PassError, RecipeError
from mezzotint.compiler.graph.nodes import counts
from mezzotint.passes import center_attention
from mezzotint.passes.center_attention import CenterAttention
from mezzotint.passes.normalize import Normalize
from tests.conftest import Check
from tests.helpers.attention import CHANNELS, MASKED, SOFTMAX, SPLIT, attention_program, fidelity, values_of
from tests.helpers.tiny import tiny_program

LOUD = (0.0, 0.0, 0.0, 100.0, 0.0, 0.0, 0.0, 0.0)
ALL = CenterAttention(queries=True, values=True)
SHARED = SPLIT.replace("(q4)", "(k4)").replace("q4 = Reshape (queries, heads)", "k4 = Reshape (keys, heads)", 1)
SHARED = SHARED.replace("k4 = Reshape (keys, heads) k =", "k =")  # the queries are the keys
OVER_QUERIES = SOFTMAX.replace("-1", "2")
WHERE = "test = Less (scores, half) seen = Where (test, half, scores) weights = Softmax <axis = -1> (seen)"


def test_all_three_are_centered_under_a_mask(check_golden: Check) -> None:
    """Keys and values in front of the split into heads; the pipeline compares both graphs in numbers."""
    after = check_golden(ALL, "all")
    assert after.history[-1].note == "of 1 attentions 1 lose the mean key, 1 the mean query, 1 the mean value"


@pytest.mark.parametrize("softmax", [SOFTMAX, MASKED])
def test_means_over_the_tokens_are_taken_out(context: Context, softmax: str) -> None:
    """In numbers: what the products read has no mean, and what is added is q . mean and the mean value."""
    program = attention_program(softmax, key_bias=LOUD)
    q, k, v, _ = (value.astype(np.float64) for value in values_of(program, context, "q", "k", "v"))
    after = pipeline.run_passes(program, [ALL], context)
    product, mix = (next(n for n in after.graph if n.name == name) for name in ("scores", "mix"))
    names = [str(value.name) for value in (*product.inputs, mix.inputs[1]) if value is not None]
    seen = values_of(after, context, *names, "scores_of_mean", "values_mean")
    wanted = [q - q.mean(axis=2, keepdims=True), k - k.mean(axis=3, keepdims=True), v - v.mean(axis=2, keepdims=True)]
    for got, want in zip(seen, (*wanted, q.mean(axis=2, keepdims=True) @ wanted[1]), strict=False):
        np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(seen[4].reshape(2, CHANNELS), v.mean(axis=2).reshape(2, CHANNELS), atol=1e-5)


def test_a_mean_over_anything_else_is_refused(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(center_attention, "ROW_TOKENS", 2)  # the channels
    with pytest.raises(PassError, match="changed the function"):
        pipeline.run_passes(attention_program(), [CenterAttention()], context)


def test_rows_that_others_read_are_centered_behind_the_split(context: Context) -> None:
    """The queries keep their mean, which counts."""
    program = attention_program(split=SHARED)
    after = pipeline.run_passes(program, [CenterAttention()], context)
    product = next(node for node in after.graph if node.name == "scores")
    assert [value.name for value in product.inputs if value is not None] == ["q", "k_centered"]


@pytest.mark.parametrize("softmax", [OVER_QUERIES, WHERE])
def test_other_softmaxes_stay(context: Context, softmax: str) -> None:
    program = attention_program(softmax)
    after = pipeline.run_passes(program, [ALL], context)
    assert counts(after.graph) == counts(program.graph)
    assert after.history[-1].note == "no attention to center"


def test_a_channel_that_is_loud_for_all_tokens_costs_nothing(context: Context) -> None:
    """The scores' product alone is quantized. With the bias the quiet channels of the keys have a level or two."""
    quiet, loud = attention_program(), attention_program(key_bias=LOUD)
    before, spoiled, centered = (
        fidelity(program, context, *steps, islands=("mix",))
        for program, steps in ((quiet, ()), (loud, ()), (loud, (CenterAttention(),)))
    )
    assert spoiled < before - 8
    assert centered > before


def test_centered_values_hide_what_rounding_takes_from_a_row(context: Context) -> None:
    """With 4 bits most of 64 weights round to 0, and the values have a mean of 1."""
    plain, centered = (
        fidelity(attention_program(), context, *steps, bits=4) for steps in ((), (CenterAttention(values=True),))
    )
    assert centered > plain + 5


def test_products_of_three_dimensions(context: Context) -> None:
    """One head, without a split: the means are taken in front of the products."""
    after = pipeline.run_passes(tiny_program(), [Normalize(), ALL], context)
    assert counts(after.graph)["ReduceMean"] == 3
    assert "1 the mean value" in after.history[-1].note


def test_nothing_to_center_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to center"):
        CenterAttention(keys=False)
