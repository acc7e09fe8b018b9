"""Sparsities of layers under a budget: the best of all combinations, within it."""

from __future__ import annotations

import itertools

import pytest

from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.pruning.levels import LayerLevels, SparsityBudget, SparsityProgram
from mezzotint.compiler.pruning.patterns import PruningPattern

FREE = PruningPattern.of("unstructured", "here")
LEVELS = (0.0, 0.5, 0.75)
LAYERS = [
    LayerLevels("a", 1000, 50_000, {0.0: 0.0, 0.5: 1.0, 0.75: 5.0}),
    LayerLevels("b", 4000, 40_000, {0.0: 0.0, 0.5: 0.2, 0.75: 3.0}),
    LayerLevels("c", 2000, 90_000, {0.0: 0.0, 0.5: 2.0, 0.75: 2.5}),
]


def takes(kind: SparsityBudget, chosen: tuple[float, ...]) -> float:
    """From the definitions: bits of the file over those in fp32, multiplications, products of bits over W8A8's."""
    pairs = list(zip(LAYERS, chosen, strict=True))
    if kind == "size":
        bits = sum((1 - s) * layer.weights * 4 + layer.weights * (s > 0) for layer, s in pairs)
        return (bits / 8 + 500) / 30_000
    share = sum((1 - s) * layer.macs for layer, s in pairs) / sum(layer.macs for layer in LAYERS)
    return share if kind == "flops" else share * 4 * 8 / 64


@pytest.mark.parametrize(
    ("kind", "amount"), [("size", 0.1), ("size", 0.12), ("flops", 0.4), ("flops", 0.7), ("bops", 0.3)]
)
def test_no_combination_is_better(kind: SparsityBudget, amount: float) -> None:
    program = SparsityProgram(kind, amount, FREE, 4, 500, 30_000)
    chosen, taken = program.choose(LAYERS, "here")
    mine = tuple(chosen[layer.name] for layer in LAYERS)
    assert taken == pytest.approx(takes(kind, mine)) and taken <= amount

    def error(levels: tuple[float, ...]) -> float:
        return sum(layer.errors[s] for layer, s in zip(LAYERS, levels, strict=True))

    fitting = [c for c in itertools.product(LEVELS, repeat=3) if takes(kind, c) <= amount]
    assert error(mine) == min(map(error, fitting)) and len(fitting) < 27


def test_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(RecipeError, match=r"smallest possible is 0\.2500 of the multiplications"):
        SparsityProgram("flops", 0.2, FREE, 8, 0, 1).choose(LAYERS, "prune_weights")
