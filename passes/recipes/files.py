"""Recipes by name, from files and from plain data; passes by name with their options checked.

A recipe file is the same as a named recipe, in YAML (`mezzotint recipes NAME` prints one):

    name: mine
    extends: w8a8            # optional; `passes` then replaces the list, or is left out
    passes:
      - normalize
      - pass: choose_scales
        options: {activations: percentile, percentile: 99.9}
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mezzotint.compiler.core.pipeline import Pass, Recipe
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.yaml_text import read_yaml
from mezzotint.runtime.targets import ONNXRUNTIME, TARGETS, target_named
from mezzotint.runtime.visible import one_line, visible

from .catalog import RECIPES

PASSES = "mezzotint.passes"  # each module in it holds one pass
ISLANDS_OPTION = "islands"
LARGEST_OPTION = 1_000_000
MOST_PASSES = 200
LONGEST_TEXT = 1_000


def pass_names() -> list[str]:
    """Return the names of all passes: one for each file of passes/."""
    package = importlib.import_module(PASSES)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg)


def make_pass(name: str, options: dict[str, Any] | None = None, where: str = "recipe") -> Pass:
    """Return a pass by its name, with checked options. Raise RecipeError, with the nearest name for a misspelt one."""
    if name not in pass_names():
        raise RecipeError(f"there is no pass called {name!r}", where=where, hint=_nearest(name, pass_names()))
    module = importlib.import_module(f"{PASSES}.{name}")
    cls = getattr(module, "".join(part.capitalize() for part in name.split("_")))
    known = [f.name for f in fields(cls)]
    for option in options or {}:
        if option not in known:
            raise RecipeError(f"{name} has no option {option!r}", where=where, hint=_nearest(str(option), known))
    try:
        made: Pass = TypeAdapter(cls).validate_python(options or {})
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"{name}.{option}: {first['msg']}, not {first['input']!r}",
            where=where,
            hint=f"see: mezzotint recipes {name}",
        ) from error
    for option, value in made.options().items():
        _check_number(f"{name}.{option}", value, where)
    return made


def _check_number(option: str, value: Any, where: str) -> None:
    """Raise RecipeError for a number that is not finite, and for one that would keep a pass busy for days."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{option} is {value}", where=where, hint="give a finite number")
    if isinstance(value, int) and abs(value) > LARGEST_OPTION:
        raise RecipeError(f"{option} is {value}", where=where, hint=f"the limit is {LARGEST_OPTION}")


def load_recipe(name: str, extended_by: tuple[str, ...] = ()) -> Recipe:
    """Return a named recipe, or one from a YAML file. Raise RecipeError if there is neither, or it is not valid."""
    if name in RECIPES:
        return RECIPES[name]
    if name in extended_by:
        raise RecipeError("the recipe extends itself", where=" -> ".join([*extended_by, name]))
    path = Path(name)
    if not path.is_file():
        hint = _nearest(name, list(RECIPES)) if path.suffix == "" else "check the path"
        raise RecipeError(f"there is no recipe called {name!r}, and no such file", hint=hint)
    data = read_yaml(path, "the recipe", RecipeError)
    return recipe_from_json(data, where=name, extended_by=extended_by)


def recipe_from_json(data: Any, where: str, extended_by: tuple[str, ...] = ()) -> Recipe:
    """Return a recipe from plain data; `keys` are those that it may have."""
    keys = ["name", "description", "paper", "baseline", "claim", "claim_eta", "target", "extends", "passes"]
    if not isinstance(data, dict):
        raise RecipeError("a recipe is a mapping with a list of passes", where=where, hint=f"keys: {', '.join(keys)}")
    for key in data:
        if key not in keys:
            raise RecipeError(f"a recipe has no key {key!r}", where=where, hint=_nearest(str(key), keys))
    base = load_recipe(str(data["extends"]), (*extended_by, where)) if "extends" in data else None
    steps = data.get("passes")
    if (steps is None and base is None) or not isinstance(steps or [], list):
        raise RecipeError("a recipe needs a list `passes`", where=where, hint="or `extends: w8a8`")
    passes = base.passes if steps is None and base is not None else tuple(_step(s, where) for s in steps or [])
    if len(passes) > MOST_PASSES:
        raise RecipeError(f"the recipe has {len(passes)} passes", where=where, hint=f"the limit is {MOST_PASSES}")
    words = {key: _text(data, key, "", where) for key in ("description", "paper", "baseline", "claim")}
    eta = data.get("claim_eta", 0.0)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise RecipeError(
            f"the recipe's `claim_eta` is {visible(repr(eta), 60)}", where=where, hint="give a number from 0 to 1"
        )
    name = _text(data, "name", Path(where).stem, where)
    usual = ONNXRUNTIME if base is None else base.target
    target = target_named(_text(data, "target", usual, where))
    if target is None:
        raise RecipeError(
            f"the recipe's `target` is {visible(repr(data['target']), 60)}",
            where=where,
            hint=f"choose one of {', '.join(TARGETS)}",
        )
    return Recipe(name, passes=passes, claim_eta=float(eta), target=target, **words)


def _text(data: dict[str, Any], key: str, default: str, where: str) -> str:
    """Return a text of a recipe on one line, or a number as a text. Raise RecipeError for anything else."""
    value = data.get(key, default)
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) or len(str(value)) > LONGEST_TEXT:
        raise RecipeError(
            f"the recipe's `{key}` is {visible(repr(value), 60)}",
            where=where,
            hint=f"give a text of at most {LONGEST_TEXT} characters",
        )
    return one_line(value)


def with_options(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """Return the recipe with `pass.option` settings applied to every pass of that name. Raise RecipeError.

    Islands that are set for one pass are those of all passes that have islands, unless they are set for them too.
    """
    passes = list(recipe.passes)
    for key, value in settings.items():
        name, dot, option = key.partition(".")
        present = [p.name for p in passes]
        if not dot or name not in present:
            raise RecipeError(
                f"--set {key}: the recipe {recipe.name!r} has no pass {name!r}",
                where=f"recipe {recipe.name}",
                hint=_nearest(name, present) + "; the form is pass.option=value",
            )
        passes = [
            make_pass(name, {**p.options(), option: value}, f"--set {key}") if p.name == name else p for p in passes
        ]
    chosen = {p.name: p.options()[ISLANDS_OPTION] for p in passes if f"{p.name}.{ISLANDS_OPTION}" in settings}
    if chosen:
        islands = next(iter(chosen.values()))
        passes = [
            make_pass(p.name, {**p.options(), ISLANDS_OPTION: islands}, f"--set {next(iter(chosen))}.{ISLANDS_OPTION}")
            if p.name in recipe.islands_by_pass and p.name not in chosen
            else p
            for p in passes
        ]
    return replace(recipe, passes=tuple(passes))


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as the text of a YAML file that load_recipe reads."""
    return yaml.safe_dump(recipe.to_json(), sort_keys=False, width=110)


def _step(step: Any, where: str) -> Pass:
    if isinstance(step, str):
        return make_pass(step, where=where)
    if isinstance(step, dict) and isinstance(step.get("pass"), str) and set(step) <= {"pass", "options"}:
        options = step.get("options") or {}
        if isinstance(options, dict):
            return make_pass(step["pass"], options, where)
    raise RecipeError(f"not a pass: {step!r}", where=where, hint="write `- name` or `- {pass: name, options: {...}}`")


def _nearest(name: str, known: list[str]) -> str:
    close = get_close_matches(name[:100], known, n=1, cutoff=0.5)
    listed = f"choose from: {', '.join(known)}" if known else "it has no options: leave this one out"
    return f"did you mean {close[0]!r}?" if close else listed
