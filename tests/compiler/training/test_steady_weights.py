"""Scales that follow the magnitudes of weights, and weights that stay where they are sure of their integer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.torch_graph.convert import TorchGraph
from mezzotint.compiler.torch_graph.quantizers import Quantizer
from mezzotint.compiler.training.moving_weights import MovingWeight
from mezzotint.compiler.training.restraints import stop
from mezzotint.compiler.training.steady_weights import (
    SURE,
    StatisticalScales,
    SureWeights,
    distances_from_thresholds,
)
from mezzotint.passes.distill import Distill
from tests.passes.test_distill import integers_of, program, trained, unjudged  # noqa: F401  fixtures

SCALES = torch.tensor([0.5, 0.25])


def one_weight(start: torch.Tensor, axis: int = 0) -> tuple[TorchGraph, MovingWeight]:
    """A graph with a quantizer of 3 bits, and the weight that it rounds."""
    part = Quantizer(SCALES, torch.zeros(2), -3, 3, axis)
    offsets = (nn.Parameter(torch.zeros_like(start)),)
    shape = [-1 if d == axis else 1 for d in range(start.ndim)]
    unit = SCALES.reshape(shape).expand_as(start)
    weight = MovingWeight("weight", nn.Parameter(start.clone()), start, unit, offsets, part)
    graph: Any = SimpleNamespace(module=nn.ModuleDict({"part": part}))
    return graph, weight


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_follows_the_mean_magnitude_of_its_row(axis: int) -> None:
    start = torch.tensor([[1.0, -1.0, 2.0], [0.0, 0.0, 0.0]]).movedim(0, axis)
    graph, weight = one_weight(start, axis)
    scales = StatisticalScales(graph, [weight])
    same = scales.values({"weight": start})["part.scale"]
    assert torch.equal(same, SCALES), "exactly those of the start"
    louder = torch.tensor([[-2.0, 3.0, 3.0], [1.0, 0.0, 0.0]]).movedim(0, axis)
    found = scales.values({"weight": louder})["part.scale"]
    # Magnitudes of 4 and 8 in the first row; the second had none at the start, and keeps its scale.
    torch.testing.assert_close(found, torch.tensor([1.0, 0.25]))
    scales.settle({"weight": louder})
    assert weight.quantizer is not None
    assert torch.equal(weight.quantizer.scale.detach(), found)


def test_the_distance_is_that_from_the_nearest_middle() -> None:
    part = Quantizer(SCALES, torch.zeros(2), -3, 3, 0)
    v = torch.tensor([[0.0, 0.5, -1.6, 2.49], [3.0, 4.0, -3.25, -2.5]])
    expected = torch.tensor([[0.5, 0.0, 0.1, 0.01], [0.5, 1.5, 0.75, 0.0]])
    torch.testing.assert_close(distances_from_thresholds(part, v), expected)
    part.use_levels(np.array([[-8, 0, 4], [-1, 0, 1]], np.int8))
    levels = torch.tensor([[-4.0, 1.0], [0.5, 2.0]])  # in distances of neighbours: 8, 4, 1 and 1
    torch.testing.assert_close(distances_from_thresholds(part, levels), torch.tensor([[0.0, 0.25], [0.0, 1.5]]))


def test_only_weights_near_a_threshold_move_in_the_last_phase() -> None:
    start = torch.tensor([[0.0, 0.26, 0.24], [0.125, 0.4, 0.2]])  # thresholds at 0.25 and 0.125
    graph, weight = one_weight(start)
    (offsets,) = weight.offsets
    optimizer = torch.optim.Adam([offsets], lr=0.01)
    sure = SureWeights(graph, [weight], 0.05)
    near = torch.tensor([[False, True, True], [True, False, False]])
    moves = []
    for share in (0.0, SURE):  # Adam has a momentum in the second step
        offsets.grad = torch.ones_like(start)
        before = offsets.detach().clone()
        sure.restrain(optimizer, {"weight": start}, share)
        optimizer.step()
        moves.append(offsets.detach() != before)
    assert moves[0].all()
    assert torch.equal(moves[1], near)
    # Scales that moved move the thresholds: with twice the scale the first row has its own at 0.5.
    offsets.grad = torch.ones_like(start)
    sure.restrain(optimizer, {"weight": start, "part.scale": 2 * SCALES}, 1.0)
    assert not offsets.grad[0].any() and offsets.grad[1].tolist() == [0, 0, 0]
    assert sure.memory() == {}


def test_a_variable_without_a_step_can_be_stopped() -> None:
    variable = nn.Parameter(torch.ones(2))
    variable.grad = torch.ones(2)
    stop(torch.optim.Adam([variable]), variable, torch.tensor([True, False]))
    assert variable.grad.tolist() == [0, 1]


@pytest.mark.usefixtures("unjudged")
def test_what_is_written_has_the_scales_of_its_weights(program: Program, context: Context) -> None:  # noqa: F811
    options: dict[str, Any] = {"floats": False, "scales": "statistics", "weight_steps": 0.05, "iterations": 8}
    after = trained(program, context, **options, checks=1)
    again = trained(program, context, **options, checks=1, boundary=1e-9)
    pairs = list(zip(find_weights(program.graph), find_weights(after.graph), strict=True))
    ratios = np.concatenate([new.scale() / old.scale() for old, new in pairs])
    assert np.ptp(ratios) > 0.01 and np.abs(ratios - 1).max() < 0.5
    for _, new in pairs:
        levels = new.rows() / new.scale()[:, None]
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
    assert any((integers_of(old) != integers_of(new)).any() for old, new in pairs)
    assert not np.array_equal(again.training[-1].losses[7], after.training[-1].losses[7]), "weights stood still"
    assert again.training[-1].losses[:6] == after.training[-1].losses[:6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "none", "scales": "statistics"}, "scales follow weights that move"),
        ({"weights": "adapters", "boundary": 0.1}, "weights stay one by one"),
        ({"boundary": 0.1, "level_steps": 0.1}, "levels that stay"),
        ({"boundary": -0.1}, "boundary is -0.1"),
    ],
)
def test_what_cannot_be_combined_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Distill(**options)
