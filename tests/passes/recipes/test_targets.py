"""Targets of recipes: what the passes say, the forms that they get, refusals with recipes that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mezzotint.compiler.audit.suggestions import best_recipe
from mezzotint.compiler.errors import RecipeError
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import load_recipe, recipe_from_json, to_yaml, with_options
from mezzotint.passes.recipes.targets import default_recipe, for_target, targets_of
from mezzotint.runtime.targets import TARGETS, Target, target_named

OTHERS: tuple[Target, ...] = ("openvino", "tensorrt", "portable")


def options(name: str, target: Target, step: str) -> dict[str, Any]:
    return next(p.options() for p in for_target(RECIPES[name], target).passes if p.name == step)


def test_the_passes_decide_which_targets_a_recipe_has() -> None:
    by_lowering: dict[str, set[tuple[Target, ...]]] = {}
    for recipe in RECIPES.values():
        lowering = next((str(p.options()["lowering"]) for p in recipe.passes if p.name == "insert_qdq"), "none")
        by_lowering.setdefault(lowering, set()).add(targets_of(recipe))
        assert for_target(recipe, recipe.target) == recipe
    everywhere = ("onnxruntime", *OTHERS)
    assert by_lowering == {"none": {everywhere}, "qdq": {everywhere}, "constant": {OTHERS}, "integer": {everywhere[:1]}}
    assert tuple(TARGETS) == everywhere and all(target_named(name) == name for name in everywhere)


@pytest.mark.parametrize("target", OTHERS)
def test_a_static_recipe_gets_the_form_of_its_target(target: Target) -> None:
    recipe = for_target(RECIPES["gptq"], target)
    assert recipe.target == target
    assert options("gptq", target, "insert_qdq")["lowering"] == "constant"
    assert options("gptq", target, "choose_scales")["symmetric"] == ("all" if target == "tensorrt" else "products")
    assert for_target(recipe, target) == recipe
    assert for_target(RECIPES["gptq"], "onnxruntime") == RECIPES["gptq"]
    assert recipe_from_json(recipe.to_json(), "here") == recipe


@pytest.mark.parametrize(
    ("name", "settings", "target", "words"),
    [
        ("w8a8-best", {}, "openvino", "the lowering `integer` writes operations of onnxruntime"),
        ("tfmq", {}, "tensorrt", "the lowering `integer`"),
        ("w8a8-steps", {"insert_qdq.lowering": "qdq"}, "portable", "scales for each channel of an activation"),
        ("w8a8-constant", {"step_scales.zero_point": "table"}, "openvino", "zero points that depend on the timestep"),
        ("w8a8-constant", {}, "onnxruntime", "would run these in float"),
    ],
)
def test_a_contradiction_is_refused_with_recipes_that_fit(
    name: str, settings: dict[str, Any], target: Target, words: str
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        for_target(with_options(RECIPES[name], settings), target)
    assert f"the recipe {name!r} has no form for the target {target}" in caught.value.what
    hint = str(caught.value.hint)
    assert f"for {target}: --recipe {default_recipe(target)}" in hint
    named = hint.partition("--recipe ")[2].partition(" and others")[0].split(", ")
    assert len(named) > 3 and all(target in targets_of(RECIPES[other]) for other in named)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_recipe_of_ours(target: Target) -> None:
    recipe = for_target(RECIPES[default_recipe(target)], target)
    assert best_recipe(recipe) == recipe.name


def test_a_recipe_file_has_a_target(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: w8a8\ntarget: tensorrt\n")
    assert load_recipe(str(file)).target == "tensorrt"
    assert "target" not in to_yaml(RECIPES["w8a8"]) and "target: portable" in to_yaml(RECIPES["w8a8-constant"])
    file.write_text("extends: w8a8-constant\n")
    assert load_recipe(str(file)).target == "portable"
    file.write_text("extends: w8a8\ntarget: openvin\n")
    with pytest.raises(RecipeError, match="the recipe's `target` is 'openvin'") as caught:
        load_recipe(str(file))
    assert "choose one of onnxruntime, openvino, tensorrt, portable" in str(caught.value.hint)
