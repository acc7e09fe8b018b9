"""Recipes: named, from files, with options; and each way to write one wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mezzotint.compiler.audit.suggestions import islands_option
from mezzotint.compiler.errors import RecipeError
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.recipes import files as recipe_files
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import load_recipe, make_pass, recipe_from_json, to_yaml, with_options


def test_every_file_of_the_folder_is_a_pass() -> None:
    folder = Path(recipe_files.__file__).parents[1]
    files = {f.stem for f in folder.glob("*.py")} - {"__init__"}
    assert set(recipe_files.pass_names()) == files
    for name in files:
        assert make_pass(name).name == name


@pytest.mark.parametrize("name", RECIPES)
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    file = tmp_path / "copy.yaml"
    file.write_text(to_yaml(RECIPES[name]))
    assert load_recipe(str(file)) == RECIPES[name]


def test_options_survive_the_round_trip(tmp_path: Path) -> None:
    changed = with_options(RECIPES["w8a8"], {"choose_scales.percentile": 99.0, "insert_qdq.islands": ["first", "mid*"]})
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(changed))
    again = load_recipe(str(file))
    assert again == changed
    assert InsertQdq(islands=("first", "mid*")) in again.passes


def test_extends(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: w8a8\ndescription: the same\n")
    mine = load_recipe(str(file))
    assert (mine.name, mine.description, mine.passes) == ("mine", "the same", RECIPES["w8a8"].passes)
    other = tmp_path / "other.yaml"
    other.write_text(f"name: short\nextends: {file}\npasses: [normalize]\n")
    assert [p.name for p in load_recipe(str(other)).passes] == ["normalize"]


def test_a_file_may_not_extend_itself(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(f"extends: {b}\n")
    b.write_text(f"extends: {a}\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(str(a))


def test_settings_from_the_command_line_may_be_words() -> None:
    """`--set` hands over what YAML makes of a word; numbers may come as numbers or as text."""
    assert make_pass("choose_scales", {"percentile": "99.5"}) == ChooseScales(percentile=99.5)
    assert make_pass("insert_qdq", {"islands": []}) == InsertQdq(islands=())


@pytest.mark.parametrize(
    ("name", "options", "message", "hint"),
    [
        ("normalise", {}, "no pass called 'normalise'", "'normalize'"),
        ("fuse_everything", {}, "no pass called", "choose from: allocate_steps"),
        ("choose_scales", {"percentil": 99}, "no option 'percentil'", "'percentile'"),
        ("normalize", {"level": 1}, "no option 'level'", ""),
        ("choose_scales", {"percentile": "high"}, "choose_scales.percentile", "mezzotint recipes choose_scales"),
        ("choose_scales", {"activations": "median"}, "choose_scales.activations", "mezzotint recipes"),
        ("choose_scales", {"activation_bits": 7.5}, "choose_scales.activation_bits", "mezzotint recipes"),
        ("insert_qdq", {"islands": "first"}, "insert_qdq.islands", "mezzotint recipes"),
        ("observe", {"groups": None}, "observe.groups", "mezzotint recipes"),
    ],
)
def test_passes_that_cannot_be_made(name: str, options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        make_pass(name, options, "my recipe")
    assert caught.value.where == "my recipe"
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "a mapping"),
        (["normalize"], "a mapping"),
        ({"name": "x"}, "needs a list `passes`"),
        ({"passes": "normalize"}, "needs a list `passes`"),
        ({"passes": {"pass": "normalize"}}, "needs a list `passes`"),
        ({"pases": ["normalize"]}, "no key 'pases'"),
        ({"passes": [3]}, "not a pass: 3"),
        ({"passes": [{"normalize": {}}]}, "not a pass"),
        ({"passes": [{"pass": "normalize", "option": {}}]}, "not a pass"),
        ({"passes": [{"pass": "observe", "options": ["groups"]}]}, "not a pass"),
        ({"passes": [{"pass": "observe", "options": {"group": 2}}]}, "no option 'group'"),
        ({"passes": ["observe", "normalize"]}, "observe needs 'normal'"),
        ({"extends": "w8a9"}, "no recipe called 'w8a9'"),
    ],
)
def test_recipes_that_cannot_be_read(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from_json(data, where="file.yaml")


def test_names_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe called 'w8a'") as caught:
        load_recipe("w8a")
    assert "'w8a8'" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_bytes(b"passes: [\xff")
    with pytest.raises(RecipeError, match="no text in UTF-8"):
        load_recipe(str(broken))
    broken.write_text("passes: [normalize")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(str(broken))


def test_with_options() -> None:
    changed = with_options(RECIPES["w8a8"], {"choose_scales.activations": "mse"})
    assert ChooseScales(activations="mse") in changed.passes
    assert RECIPES["w8a8"].passes != changed.passes
    assert with_options(RECIPES["w8a8"], {}) == RECIPES["w8a8"]
    two = with_options(RECIPES["w8a8"], {"choose_scales.activations": "mse", "choose_scales.weights": "minmax"})
    assert ChooseScales(activations="mse", weights="minmax") in two.passes


def test_islands_are_those_of_the_passes() -> None:
    four = ("first", "second", "penultimate", "last")
    assert {name: recipe.islands for name, recipe in RECIPES.items() if recipe.islands != ("first", "last")} == {
        "float": (),
        "w8a8-steps": four,
        "w8a8-best": four,
        "w8a8-tokens": four,
        "w8a8-constant": four,
        "w4a8": four,
        "w4a8-yaqa": four,
        "w4a4": four,
        "w4a8-best": four,
        "w6a6-best": four,
    }
    assert with_options(RECIPES["tdq"], {"insert_qdq.islands": ["mid*"]}).islands == ("mid*",)


def test_all_passes_keep_the_same_islands() -> None:
    followed = with_options(RECIPES["q-diffusion"], {"insert_qdq.islands": []})
    assert [p.options()["islands"] for p in followed.passes if "islands" in p.options()] == [[], []]
    apart = {"split_shortcuts.islands": ["first", "last"], "insert_qdq.islands": []}
    with pytest.raises(RecipeError, match="keeps 'first', 'last' in float, and insert_qdq nothing") as caught:
        with_options(RECIPES["q-diffusion"], apart)
    assert caught.value.hint == "set the same islands for: split_shortcuts, insert_qdq"
    both = {"split_shortcuts.islands": ["first"], "insert_qdq.islands": ["first"]}
    assert with_options(RECIPES["q-diffusion"], both).islands == ("first",)


def test_what_a_recipe_is_beside_exists() -> None:
    for recipe in RECIPES.values():
        assert bool(recipe.baseline) == bool(recipe.claim)
        assert not recipe.baseline or recipe.baseline in RECIPES
        assert recipe.paper or recipe.name == "float"


def test_methods_are_what_they_say() -> None:
    """A paper's own form under the paper's name, and a baseline that lacks the method and nothing else."""

    def options(recipe: str, step: str) -> dict[str, Any]:
        (found,) = (p.options() for p in RECIPES[recipe].passes if p.name == step)
        return found

    assert options("ptqd-w8a8", "fit_noise") == {"form": "ptqd", "gate": False, "noise": True}
    assert options("d2-dpm", "fit_noise") == {"form": "regression", "gate": False, "noise": False}
    for name in ("ptqd-w8a8", "d2-dpm"):
        gated, plain = (RECIPES[f"{name.removesuffix('-w8a8')}-gated"], RECIPES[name])
        assert gated.passes[:-1] == plain.passes[:-1] and gated.passes[-1].options()["gate"]
    assert RECIPES["pcr"].passes[:-1] == RECIPES["w8a8-calls"].passes == RECIPES["tfmq"].passes[:-1]
    assert RECIPES["ptqd"].passes[:-1] == RECIPES["q-diffusion"].passes
    assert options("ptqd", "fit_noise") == options("ptqd-w8a8", "fit_noise")
    assert options("eda-dm", "reconstruct")["inner"] > 0 == options("qdrop", "reconstruct")["inner"]
    assert [p for p in RECIPES["w8a8"].passes if p.name != "freeze_time"] == list(RECIPES["w8a8-time"].passes)
    assert "freeze_time" in [p.name for p in RECIPES["tfmq"].passes]
    assert not options("dfq", "choose_scales")["per_channel"]
    without = [p for p in RECIPES["dfq"].passes if p.name not in ("equalize_weights", "correct_bias")]
    assert without == list(RECIPES[RECIPES["dfq"].baseline].passes)


@pytest.mark.parametrize(
    ("setting", "message", "hint"),
    [
        ("choose_scale.weights", "no pass 'choose_scale'", "'choose_scales'"),
        ("weights", "no pass 'weights'", "pass.option=value"),
        ("fit_noise.x", "no pass 'fit_noise'", ""),
        ("choose_scales.weight", "no option 'weight'", "'weights'"),
    ],
)
def test_settings_that_fit_nothing(setting: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        with_options(RECIPES["w8a8"], {setting: "minmax"})
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(("name", "judges_tables"), [("w8a8-steps", False), ("w8a8-constant", True)])
def test_advice_about_islands_names_the_passes_that_use_them(name: str, judges_tables: bool) -> None:
    recipe = RECIPES[name]

    advice = islands_option(recipe, ["conv_9"])

    assert ("step_scales.islands" in advice) == judges_tables
    assert "insert_qdq.islands=[first, second, penultimate, last, conv_9]" in advice
    changed = with_options(recipe, {"insert_qdq.islands": ["first", "conv_9"]})
    assert set(changed.islands_by_pass) == set(recipe.islands_by_pass)
    assert set(changed.islands_by_pass.values()) == {("first", "conv_9")}
