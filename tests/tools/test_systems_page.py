"""tools/systems_page.py: each system says what runs of it, each recipe of a paper has a row, and all verdicts count."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import pass_names
from tests.helpers.docs_examples import ROOT
from tools.systems_page import BOARDS, own_passes, read_effects, read_systems, systems_page

DOCS = ROOT / "docs"
OURS = {"w8a8-steps", "w8a8-constant", "w8a8-best", "w8a8-tokens", "w4a8", "w4a8-best", "w6a6-best", "w4a4"}
COMMANDS = {"debug", "mix"}


def test_every_recipe_of_a_paper_is_a_system() -> None:
    named = [name for system in read_systems() for name in system.recipes]
    assert len(set(named)) == len(named) and set(named) <= set(RECIPES)
    assert {r.name for r in RECIPES.values() if r.baseline} - OURS <= set(named)


def test_parts_are_passes_or_commands() -> None:
    parts = {name for system in read_systems() for name in system.passes}
    assert parts <= {*pass_names(), *COMMANDS}
    assert len({system.system for system in read_systems()}) == len(read_systems()) >= 117


def test_a_system_that_says_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- {system: A, passes: [observe]}\n")
    with pytest.raises(ValueError, match="A has no recipe, and does not say what is missing"):
        read_systems(tmp_path / "list.yaml")


def test_every_verdict_of_the_boards_is_read() -> None:
    lines = [line for page in BOARDS.values() for line in (DOCS / page).read_text("utf-8").splitlines()]
    verdicts = [line for line in lines if re.match(r"- `[\w-]+` at ", line)]
    assert len(verdicts) > 40
    assert sum(map(len, read_effects(DOCS).values())) == len(verdicts)


def test_the_row_of_a_system(tmp_path: Path) -> None:
    for page in BOARDS.values():
        (tmp_path / page).write_text("")
    images = "Images +3.0 (+1.0 to +4.0) dB in the median, +1.0 (-1.0 to +2.0) dB in the 10th percentile"
    (tmp_path / "leaderboard.md").write_text(f"- `comq` at W4A8: better than `w8a8`. {images}; epsilon +2.0 dB\n")
    (row,) = [line for line in systems_page(tmp_path, "").splitlines() if line.startswith("| COMQ |")]
    assert "[2403.07134](https://arxiv.org/abs/2403.07134) | [`comq`](recipes/comq.md) | `round_weights` |" in row
    assert "digits W4A8: better, +3.0 dB (+1.0 to +4.0), epsilon +2.0 dB | one order of columns for all rows" in row
    assert "The images of 1 beat" in systems_page(tmp_path, "")


def test_a_pass_twice_is_seen() -> None:
    assert own_passes(RECIPES["smoothquant"]) == ["observe", "smooth_scales"]
    assert own_passes(RECIPES["gptaq"]) == ["round_weights"]
