"""Recipes and targets: which recipes have a form for a target, and which one it gets by default."""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Recipe
from mezzotint.compiler.errors import RecipeError
from mezzotint.runtime.targets import ONNXRUNTIME, TARGETS, Target

from .catalog import CONSTANT, DEFAULT, RECIPES

_NAMED = 6  # recipes in a hint


def default_recipe(target: Target) -> str:
    """Return the name of the recipe that a target gets when none is chosen."""
    return DEFAULT if target == ONNXRUNTIME else CONSTANT


def targets_of(recipe: Recipe) -> tuple[Target, ...]:
    """Return the targets that a recipe has a form for, as its passes say."""
    return tuple(target for target in TARGETS if _refusal(recipe, target) is None)


def for_target(recipe: Recipe, target: Target) -> Recipe:
    """Return a recipe with its passes as a target needs them.

    Raise RecipeError, naming recipes that have a form for the target, if this one has none.
    """
    refusal = _refusal(recipe, target)
    if refusal is None:
        return recipe.for_target(target)
    fitting = [name for name, known in RECIPES.items() if _refusal(known, target) is None and name != "float"]
    names = dict.fromkeys([default_recipe(target), *fitting])
    hint = f"for {target}: --recipe {', '.join(list(names)[:_NAMED])} and others; `mezzotint recipes` has the targets"
    if others := [name for name in targets_of(recipe) if name != target]:
        hint = f"compile this recipe for {', '.join(others)} (--target); {hint}"
    raise RecipeError(
        f"the recipe {recipe.name!r} has no form for the target {target}: {refusal.what}",
        where=f"recipe {recipe.name!r}, {refusal.where}",
        hint=f"{refusal.hint}; or {hint}" if refusal.hint else hint,
    )


def _refusal(recipe: Recipe, target: Target) -> RecipeError | None:
    try:
        recipe.for_target(target)
    except RecipeError as error:
        return error
    return None
