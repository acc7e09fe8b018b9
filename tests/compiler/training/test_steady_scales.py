"""Scales whose gradients kept their sign over a window stay in the next one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.training.steady_scales import OrderlyScales
from mezzotint.passes.distill import Distill

WINDOW = 5
# Gradients of six scales in a window: changes of sign and pairs are 0 of 4, 4 of 4, 1 of 4, 2 of 4, none, and 1 of 2.
FIRST = torch.tensor(
    [
        [1.0, 1, 1, 1, 0, 1],
        [2, -1, 1, -1, 0, 0],
        [1, 1, 1, -1, 0, -2],
        [1, -3, -1, 1, 0, 0],
        [9, 1, -1, 1, 0, -1],
    ]
)
FROZEN = [True, False, True, False, False, False]
# The first one changes its sign in each iteration now, and the last one keeps it.
SECOND = torch.tensor([[-1.0, 1, 1, 1, 1, -1], [1, -1, -1, 1, 1, -1]] * 3)[:WINDOW]


def run(gradients: torch.Tensor, rule: OrderlyScales, variable: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for gradient in gradients:
        variable.grad = gradient.clone()
        rule.restrain(optimizer, {}, 0.0)
        optimizer.step()


def test_scales_with_little_disorder_are_frozen_for_a_window() -> None:
    variable, unused = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([variable, unused])
    rule = OrderlyScales([variable, unused], WINDOW, below=0.5)
    run(FIRST, rule, variable, optimizer)
    assert rule.frozen[0].tolist() == FROZEN
    assert not rule.frozen[1].any(), "without gradients nothing is known"
    assert (variable != 0).tolist() == [True, True, True, True, False, True]
    before = variable.detach().clone()
    run(SECOND, rule, variable, optimizer)
    assert (variable == before).tolist() == FROZEN, "a momentum does not move them either"
    assert rule.frozen[0].tolist() == [False, False, False, True, True, True]


def test_a_fit_that_was_stopped_goes_on_with_its_counts() -> None:
    frozen = []
    for stopped in (False, True):
        variable = nn.Parameter(torch.zeros(6))
        optimizer = torch.optim.Adam([variable])
        rule = OrderlyScales([variable], WINDOW, below=0.5)
        run(FIRST[:3], rule, variable, optimizer)
        if stopped:
            new = OrderlyScales([variable], WINDOW, below=0.5)
            for name, tensor in new.memory().items():
                tensor.copy_(rule.memory()[name])
            rule = new
        run(FIRST[3:], rule, variable, optimizer)
        frozen.append(rule.frozen[0].tolist())
    assert frozen == [FROZEN, FROZEN]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_below": 0.3}, "no scale is learned"),
        ({"freeze_below": 1.5, "scales": "both"}, "freeze_below is 1.5"),
        ({"freeze_window": 1, "freeze_below": 0.3, "scales": "both"}, "freeze_window is 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Distill(**options)  # type: ignore[arg-type]
