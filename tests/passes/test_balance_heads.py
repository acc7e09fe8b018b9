"""balance_heads: factors of heads move between the layers around an attention, and one scale serves all of them."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import counts
from mezzotint.passes import balance_heads
from mezzotint.passes.balance_heads import BalanceHeads
from tests.helpers.attention import SPLIT, Floats, attention_program, fidelity, values_of

LOUD_HEAD = (30.0, 30.0, 30.0, 30.0, 1.0, 1.0, 1.0, 1.0)
LOUD_CHANNEL = (30.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
ROTATED = SPLIT.replace("q = Transpose", "turned_q = Mul (q4, q4) q = Transpose").replace("(q4) k4", "(turned_q) k4")


def peaks(program: Program, context: Context, name: str) -> Floats:
    """Return the largest magnitude `[heads]` of queries, keys or values."""
    value, _ = values_of(program, context, name)
    largest: Floats = np.abs(value).max(axis=(0, 2, 3))
    return largest


def test_loud_queries_become_loud_keys(context: Context) -> None:
    """The largest magnitudes of both heads, of queries and of keys; nothing is added to the graph."""
    program = attention_program(query_gain=LOUD_HEAD)
    after = pipeline.run_passes(program, [BalanceHeads(values=False)], context)
    before, now = (peaks(p, context, "q") / peaks(p, context, "k") for p in (program, after))
    assert before[0] > 200 * before[1] and now[0] / now[1] == pytest.approx(1, abs=1)
    assert counts(after.graph) == counts(program.graph)
    assert after.history[-1].note.startswith("1 products of queries and keys balanced")


@pytest.mark.parametrize("gains", [LOUD_HEAD, LOUD_CHANNEL])
def test_what_balance_gains(context: Context, gains: tuple[float, ...]) -> None:
    even, loud = attention_program(), attention_program(query_gain=gains, value_gain=LOUD_HEAD)
    plain, spoiled, balanced = fidelity(even, context), fidelity(loud, context), fidelity(loud, context, BalanceHeads())
    assert spoiled < plain - 10
    assert balanced > plain - 6


def test_values_of_loud_heads_are_divided_in_the_layers_around(context: Context) -> None:
    program = attention_program(value_gain=LOUD_HEAD)
    after = pipeline.run_passes(program, [BalanceHeads(products=False)], context)
    before, now = (peaks(p, context, "v") for p in (program, after))
    assert before[0] > 15 * before[1] and now[0] < 4 * now[1]
    assert "1 values balanced" in after.history[-1].note


def test_the_mean_token_does_not_count_with_center(context: Context) -> None:
    """A bias in the keys, which center_attention takes out, would move into the queries."""
    program = attention_program(key_bias=(0.0, 0.0, 0.0, 1000.0, 0.0, 0.0, 0.0, 0.0))
    notes = [
        pipeline.run_passes(program, [BalanceHeads(values=False, center=center)], context).history[-1].note
        for center in (False, True)
    ]
    assert "balanced" in notes[0] and notes[1] == "nothing gains enough"


def test_the_best_factors_minimize_the_stated_error() -> None:
    """q of one loud channel, k of ones: with s = 1 / sqrt(30) for it both errors are equal and their sum least."""
    low, square = np.array([-30.0, -1.0]), np.array([900.0, 1.0]) / 3
    query = balance_heads._Channels(low, -low, square)
    key = balance_heads._Channels(np.array([-1.0, -1.0]), np.array([1.0, 1.0]), np.array([1.0, 1.0]) / 3)
    factors, gain = balance_heads._best(query, key, width=2)
    ratio = factors[0] / factors[1]

    def error(s: float) -> float:
        first = max(30 * s, 1) ** 2 * (1 / s**2 + 1) / 3
        return first + max(1 / s, 1) ** 2 * (900 * s**2 + 1) / 3

    assert error(ratio) <= 1.05 * min(error(s) for s in np.geomspace(0.01, 1, 200))
    assert gain == pytest.approx(10 * np.log10(error(1) / error(ratio)), abs=1e-6)


def test_operands_that_take_no_factors_are_listed(context: Context) -> None:
    after = pipeline.run_passes(attention_program(split=ROTATED), [BalanceHeads(values=False)], context)
    assert after.history[-1].note == "nothing gains enough" and "scores" in after.refused


def test_nothing_to_balance_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to balance"):
        BalanceHeads(products=False, values=False)
