"""delay_softmax: every query's largest weight is 1, the function stays, and few bits are enough for flat attention."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.graph.nodes import counts
from mezzotint.passes.delay_softmax import DelaySoftmax
from tests.conftest import Check
from tests.helpers.attention import MASKED, SOFTMAX, attention_program, fidelity, values_of

READ_TWICE = f"{SOFTMAX} seen_twice = Add (weights, weights)"


def test_the_division_is_behind_the_product(check_golden: Check) -> None:
    """The pipeline compares both graphs in numbers."""
    after = check_golden(DelaySoftmax(), "masked")
    assert after.history[-1].note == "1 of 1 attentions divide behind the product with the values"


@pytest.mark.parametrize("softmax", [SOFTMAX, MASKED])
def test_weights_are_shares_of_the_largest_one(context: Context, softmax: str) -> None:
    program = attention_program(softmax)
    before, _ = values_of(program, context, "weights")
    after = pipeline.run_passes(program, [DelaySoftmax()], context)
    powers, total, _ = values_of(after, context, "weights_powers", "weights_total")
    assert np.array_equal(powers.max(axis=-1), np.ones(powers.shape[:-1]))
    np.testing.assert_allclose(powers / total, before, atol=1e-6)


def test_weights_that_something_else_reads_stay(context: Context) -> None:
    after = pipeline.run_passes(attention_program(READ_TWICE), [DelaySoftmax()], context)
    assert after.history[-1].note.startswith("0 of 1") and counts(after.graph)["Softmax"] == 1


@pytest.mark.parametrize(("bits", "gain"), [(8, 2.0), (4, 8.0)])
def test_each_query_has_the_whole_grid(context: Context, bits: int, gain: float) -> None:
    """The product with the values alone is quantized: with equal steps for all queries, and by query."""
    plain, by_query = (
        fidelity(attention_program(), context, *steps, bits=bits, islands=("scores",))
        for steps in ((), (DelaySoftmax(),))
    )
    assert by_query > plain + gain
