"""A recipe as a row of the leaderboard has it: at a width, perhaps with shorter training."""

from __future__ import annotations

import numpy as np

from mezzotint.compiler.core.pipeline import Recipe
from mezzotint.passes.recipes.files import with_options
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


def cut(recipe: Recipe, iterations: int | None) -> Recipe:
    """Return the recipe with at most so many iterations in each pass that trains; all of them for None."""
    longer = [step for step in recipe.passes if (step.options().get("iterations") or 0) > (iterations or np.inf)]
    return with_options(recipe, {f"{step.name}.iterations": iterations for step in longer}) if longer else recipe
