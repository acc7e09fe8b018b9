"""Ranks and widths: even ones within their share, chosen ones the best of all combinations within the budget."""

from __future__ import annotations

import itertools

import pytest

from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.low_rank.ranks import LayerShape, RankBudget, RankChoice

SHAPES = [LayerShape("a", 40, 360), LayerShape("b", 80, 80), LayerShape("c", 20, 100)]
ERRORS = {
    "a": {(4, 0): 3.0, (4, 1): 2.0, (4, 3): 1.5, (8, 0): 0.1, (8, 2): 0.09},
    "b": {(4, 0): 0.9, (4, 1): 0.7, (4, 3): 0.2, (8, 0): 0.5, (8, 2): 0.1},
    "c": {(4, 0): 6.0, (4, 1): 1.0, (4, 3): 0.9, (8, 0): 0.8, (8, 2): 0.1},
}
CHOICES = {name: {RankChoice(*c): e for c, e in row.items()} for name, row in ERRORS.items()}
TOTAL = sum(shape.rows * shape.inputs for shape in SHAPES)


def takes(budget: RankBudget, chosen: tuple[RankChoice, ...]) -> float:
    """From the definitions: bits of residuals and branches for each weight, or values of branches."""
    values = sum(c.rank * (s.rows + s.inputs) for s, c in zip(SHAPES, chosen, strict=True))
    bits = sum(c.bits * s.rows * s.inputs for s, c in zip(SHAPES, chosen, strict=True))
    return values / TOTAL if budget.mean_bits is None else (bits + 16 * values) / TOTAL


@pytest.mark.parametrize(
    "budget", [RankBudget(mean_bits, 0.04, 16) for mean_bits in (None, 4.6, 5.0, 6.5)], ids=lambda b: str(b.mean_bits)
)
def test_no_combination_is_better(budget: RankBudget) -> None:
    limit = budget.share if budget.mean_bits is None else budget.mean_bits
    chosen = budget.choose(SHAPES, CHOICES, "here")
    mine = tuple(chosen[shape.name] for shape in SHAPES)
    assert takes(budget, mine) <= limit
    every = itertools.product(*(CHOICES[shape.name] for shape in SHAPES))
    error = {c: sum(CHOICES[s.name][x] for s, x in zip(SHAPES, c, strict=True)) for c in every}
    assert error[mine] == min(e for c, e in error.items() if takes(budget, c) <= limit)


def test_a_budget_that_is_too_small() -> None:
    with pytest.raises(RecipeError, match=r"of 3 bits a weight cannot be met: the smallest possible is 4\.000"):
        RankBudget(3.0, 0.05, 16).choose(SHAPES, CHOICES, "split_ranks")


def test_even_ranks_stay_within_their_share() -> None:
    a = SHAPES[0]
    assert [a.even_rank(share, 32) for share in (0.01, 0.05, 0.5)] == [0, 1, 18] and a.even_rank(0.5, 4) == 4
    assert LayerShape("d", 4, 900).even_rank(0.9, 32) == 3  # a branch of full rank is the layer again
    assert a.branch(3) == 3 * 400 and a.ranks(0.06, 32) == [0, 1, 2, 4, 9] and a.ranks(0.06, 3) == [0, 1, 2, 3]
