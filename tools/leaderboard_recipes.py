"""A recipe as a row of the leaderboard has it: at a width, perhaps with shorter training."""

from __future__ import annotations

from typing import Any

import numpy as np

from mezzotint.compiler.core.pipeline import Pass, Recipe
from mezzotint.passes.recipes.files import make_pass, with_options
from tools.leaderboard_page import WIDTHS


def at_width(recipe: Recipe, width: str) -> Recipe:
    """Return the recipe with these bits in every pass that has an option for them.

    What mixes widths has a budget of bits on average: its own where the recipe claims to be good, elsewhere this width.
    """
    weight, activation = WIDTHS[width]
    wanted: dict[str, int | float | str] = {"weight_bits": weight, "activation_bits": activation}
    if width != recipe.claim:
        wanted["mean_bits"] = float(weight)
    settings = {
        f"{step.name}.{option}": bits
        for step in recipe.passes
        for option, bits in wanted.items()
        if step.options().get(option) is not None and not (bits == "float" and step.name != "choose_scales")
    }
    return with_options(recipe, settings)


def chosen_options(recipe: Recipe) -> list[tuple[str, dict[str, Any]]]:
    """Return the name of each pass with the options that are not its defaults.

    A pass that gets a new option, whose default is what it did before, leaves the rows of a board as they are.
    """
    return [(step.name, changed_options(step)) for step in recipe.passes]


def changed_options(step: Pass) -> dict[str, Any]:
    """Return the options of a pass that are not its defaults."""
    usual = make_pass(step.name).options()
    return {name: value for name, value in step.options().items() if value != usual[name]}


def cut(recipe: Recipe, iterations: int | None) -> Recipe:
    """Return the recipe with at most so many iterations in each pass that trains; all of them for None."""
    longer = [step for step in recipe.passes if (step.options().get("iterations") or 0) > (iterations or np.inf)]
    return with_options(recipe, {f"{step.name}.iterations": iterations for step in longer}) if longer else recipe
