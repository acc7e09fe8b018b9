"""The checks of assign_bits' options: single numbers, and what does not go together."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from ..core.option_checks import require_widths
from ..core.pipeline import Pass
from ..errors import RecipeError
from .budget import BudgetKind

BY_GRADIENTS = ("hawq", "lrp")
"""Scores that need torch."""


def budgets_of(step: Pass) -> list[BudgetKind]:
    """Return the budgets that are given."""
    return [kind for kind in get_args(BudgetKind) if getattr(step, kind) is not None]


def check_options(step: Pass) -> None:
    """Raise RecipeError for options that assign_bits cannot work with."""
    o: Any = step
    kinds = budgets_of(step)
    if len(kinds) > 1:
        raise RecipeError(
            f"assign_bits has {len(kinds)} budgets: {', '.join(kinds)}",
            where=step.name,
            hint=f"keep one: --set assign_bits.{kinds[0]}=null",
        )
    for kind in kinds:
        _require(step, kind, getattr(step, kind) > 0, "choose above 0")
    require_widths(step, "widths", least=1)
    require_widths(step, "activation_widths")
    if 1 in o.widths and o.levels is None:
        raise RecipeError(
            "weights of 1 bit have no uniform grid",
            where=f"{step.name}.widths",
            hint="give weights levels: --set assign_bits.levels=kmeans, or choose 2 bits or more",
        )
    for option in ("calls", "samples", "splits", "length", "parts", "probes"):
        _require(step, option, getattr(step, option) >= 1, "choose 1 or more")
    _require(step, "spread", 0 < o.spread < np.inf, "choose above 0, such as 0.1")
    _require(step, "float_cost", 1 <= o.float_cost < np.inf, "integers are faster: choose 1 or more")
    if o.scope == "layer" and o.score != "sqnr":
        raise RecipeError(f"the scope layer has no score {o.score}", where=step.name, hint="use score sqnr")
    if o.latency is not None and not o.floats:
        raise RecipeError(
            "widths do not change the latency, only layers in float do",
            where=f"{step.name}.latency",
            hint="set assign_bits.floats to true, or choose another budget",
        )
    if o.activation_widths != (8,) and kinds != ["bops"] and kinds:
        raise RecipeError(
            f"narrower activations save nothing of {kinds[0]}",
            where=f"{step.name}.activation_widths",
            hint="choose a budget of bops",
        )
    alone = {
        "levels, of which all channels of a weight have the same number": o.levels is not None,
        "a budget of latency, which widths do not change": o.latency is not None,
        "layers in float, which have no parts": o.floats,
        "narrower activations, which a layer has once": o.activation_widths != (8,),
        "the score mixdq, which draws images for each unit": o.score == "mixdq",
    }
    for other in (what for what, there in alone.items() if there and o.parts > 1):
        raise RecipeError(
            f"widths by output channel do not go with {other}",
            where=f"{step.name}.parts",
            hint="set assign_bits.parts to 1, or leave the other out",
        )


def _require(step: Pass, option: str, fine: bool, hint: str) -> None:
    if not fine:
        raise RecipeError(f"{step.name}.{option} is {getattr(step, option)}", where=step.name, hint=hint)
