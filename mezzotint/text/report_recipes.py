"""Recipes and passes, as data and as tables."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

from mezzotint.compiler.core.pipeline import Recipe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import load_recipe, make_pass, pass_names, to_yaml
from mezzotint.passes.recipes.targets import targets_of
from mezzotint.runtime.targets import TARGETS

from . import console


def print_recipes(name: str | None, *, as_json: bool) -> None:
    """Print all recipes, one recipe as YAML with its passes, or one pass with its options and description."""
    if name is None:
        if as_json:
            rows = [
                {**r.to_json(), "islands": list(r.islands), "targets": list(targets_of(r))} for r in RECIPES.values()
            ]
            console.print_json(rows)
            return
        table = [(r.name, r.description, ", ".join(r.islands) or "-", _targets(r), r.paper) for r in RECIPES.values()]
        console.print_table("recipes", ("name", "what it does", "kept in float", "targets", "paper"), table)
        console.print_line("mezzotint recipes NAME prints one as YAML, or a pass with its options.")
    elif name in pass_names():
        _print_pass(name, as_json)
    else:
        recipe = load_recipe(name)
        if as_json:
            console.print_json(recipe.to_json())
        else:
            console.print_text(to_yaml(recipe))


def _targets(recipe: Recipe) -> str:
    targets = targets_of(recipe)
    return "all" if set(targets) == set(TARGETS) else ", ".join(targets)


def _print_pass(name: str, as_json: bool) -> None:
    step = make_pass(name)
    module = importlib.import_module(type(step).__module__)
    types = {f.name: f.type for f in dataclasses.fields(step)}  # type: ignore[arg-type]
    options = {option: {"default": value, "type": str(types[option])} for option, value in step.options().items()}
    description = inspect.getdoc(module) or ""
    described = {"pass": name, "description": description, "options": options, "exact": step.tolerance is not None}
    if as_json:
        console.print_json(described)
        return
    console.print_text(description)
    rows = [(o, d["type"], d["default"]) for o, d in options.items()]
    console.print_table("options", ("option", "type", "default"), rows)
