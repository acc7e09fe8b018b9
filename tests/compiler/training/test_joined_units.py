"""Neighbouring units that are trained as one where their capacities differ most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.training.joined_units import capacity_of, joined_units, ties_by_capacity, united, windows_of
from mezzotint.compiler.training.subgraph import cut_out_unit
from mezzotint.compiler.training.units import NETWORK, GraphUnit, find_units
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.passes.reconstruct import Reconstruct
from tests.helpers.tiny import tiny_program

UNITS = [GraphUnit(name, frozenset(name)) for name in "abcde"]
EMPTY = ir.Graph([], [], nodes=[])


@pytest.mark.parametrize(
    ("ties", "pairs", "wanted"),
    [
        ([0, 8, 1, 7], 0, "a b c d e"),
        ([0, 8, 1, 7], 1, "a b+c d e"),
        ([0, 8, 1, 7], 2, "a b+c d+e"),
        ([4, 4, 0, 1], 2, "a+b+c d e"),
        ([0, 0, 0, 0], 2, "a+b+c d e"),
        ([1, 1, 1, 1], 4, "a+b+c+d+e"),
    ],
)
def test_the_strongest_ties_are_joined(ties: list[float], pairs: int, wanted: str) -> None:
    found = joined_units(UNITS, ties, pairs, EMPTY)
    assert " ".join(unit.name.replace(" ", "") for unit in found) == wanted
    for unit in found:
        assert unit.computed == frozenset(unit.name) - set("+ ")


@pytest.mark.parametrize(
    ("ties", "pairs", "most", "wanted"),
    [
        ([4, 3, 2, 1], 2, 3, "a+b+c d e"),
        ([4, 3, 2, 1], 3, 3, "a+b+c d+e"),
        ([4, 3, 2, 1], 2, 2, "a+b c+d e"),
        ([3, 4, 3, 1], 3, 4, "a+b+c+d e"),
        ([1, 4, 4, 1], 2, 3, "a b+c+d e"),
    ],
)
def test_no_unit_is_longer_than_the_bound(ties: list[float], pairs: int, most: int, wanted: str) -> None:
    found = joined_units(UNITS, ties, pairs, EMPTY, most)
    assert " ".join(unit.name.replace(" ", "") for unit in found) == wanted


@pytest.mark.parametrize(
    ("size", "wanted"), [(1, "a b c d e"), (2, "a+b b+c c+d d+e"), (4, "a+b+c+d b+c+d+e"), (9, "a+b+c+d+e")]
)
def test_windows_overlap(size: int, wanted: str) -> None:
    assert " ".join(unit.name.replace(" ", "") for unit in windows_of(UNITS, size, EMPTY)) == wanted
    assert windows_of([], size, EMPTY) == []


def test_more_pairs_than_there_are() -> None:
    with pytest.raises(RecipeError, match="5 pairs of neighbouring units are to be joined, and there are 4"):
        joined_units(UNITS, [1] * 4, 5, EMPTY)
    with pytest.raises(RecipeError, match="and there are 0"):
        joined_units([], [], 1, EMPTY)
    with pytest.raises(RecipeError, match=r"3 pairs .* there are 2 with at most 2 units in one"):
        joined_units(UNITS, [1] * 4, 3, EMPTY, 2)


def test_blocks_of_a_network(context: Context) -> None:
    """Capacities are bits, and a joined unit trains the weights of both, with what lies between them."""
    widths: dict[str, Any] = {"choose_scales.weight_bits": 4}
    program = pipeline.run_passes(tiny_program(steps=2), with_options(RECIPES["w8a8"], widths).passes, context)
    weights = find_weights(program.graph)
    (whole,) = find_units(program, "network")
    assert whole.name == NETWORK and capacity_of(whole, program) == 4 * sum(w.rows().size for w in weights)
    blocks = [unit for unit in find_units(program, "block") if capacity_of(unit, program)]
    capacities = [capacity_of(unit, program) for unit in blocks]
    ties = ties_by_capacity(blocks, program)
    np.testing.assert_allclose(ties, np.abs(np.diff(capacities)))
    largest = int(np.argmax(ties))
    pair = [unit for unit in blocks if unit.name in ("down", "up")]
    part = cut_out_unit(program, united(pair, program.graph))
    assert len(pair) == 2 and part.inputs == cut_out_unit(program, pair[0]).inputs, "the Resize between them is inside"

    options: dict[str, Any] = {"held_out": 0, "iterations": 2, "calls": 1, "samples": 1}
    one = replace(context, threads=1)
    after = pipeline.run_passes(program, [Reconstruct(joined=1, **options)], one)
    names = [fit.unit for fit in after.training]
    assert names[largest] == f"{blocks[largest].name} + {blocks[largest + 1].name}"
    assert len(names) == len(blocks) - 1
    with pytest.raises(RecipeError, match="are to be joined"):
        pipeline.run_passes(program, [Reconstruct(joined=len(blocks), **options)], one)
