"""tools/leaderboard.py: real rows on few pictures, a run that goes on where it stopped, and what the page says."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mezzotint.bench import peers
from mezzotint.passes.recipes.catalog import RECIPES
from tools.leaderboard_page import Row, page

TOOL = Path(__file__).parents[2] / "tools" / "leaderboard.py"
FEW = ["--images", "2", "--calibration", "2", "--steps", "3", "--recipe", "w8a8", "--width", "w8a8", "--width", "w4a8"]


@pytest.fixture(scope="module")
def board() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leaderboard", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["leaderboard"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(board: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    assert board.main([*FEW, "--folder", str(folder), "--page", str(folder / "page.md")]) == 0
    return folder


def test_rows_are_measured(measured: Path) -> None:
    rows = {f.stem: json.loads(f.read_text()) for f in (measured / "rows").glob("*.json")}
    assert set(rows) == {"w8a8-w8a8", "w8a8-w4a8", *(f"{peer}-w8a8" for peer in peers.available())}
    eight, four = rows["w8a8-w8a8"], rows["w8a8-w4a8"]
    assert eight["sqnr"] > four["sqnr"] + 5 > 5
    assert eight["speed"] > 1 and 0.1 < eight["size"] < 0.3
    assert eight["kernels"] == four["kernels"] and eight["islands"] == 2
    page = (measured / "page.md").read_text()
    assert "## W8A8" in page and "## W4A8" in page and "## W6A6" not in page
    assert f"| `w8a8` | {eight['sqnr']:.1f} |" in page


def test_it_goes_on_where_it_stopped(board: ModuleType, measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there is not measured again, what is missing is; the page says the same."""
    page = (measured / "page.md").read_text()
    (measured / "rows" / "w8a8-w4a8.json").unlink()
    kept = (measured / "rows" / "w8a8-w8a8.json").stat().st_mtime_ns
    assert board.main([*FEW, "--folder", str(measured), "--page", str(measured / "page.md")]) == 0
    said = capsys.readouterr().out
    assert "[1/1] w8a8-w4a8" in said
    assert (measured / "rows" / "w8a8-w8a8.json").stat().st_mtime_ns == kept
    columns = [
        [line.split("|")[2:6] for line in text.splitlines()] for text in (page, (measured / "page.md").read_text())
    ]
    assert columns[0] == columns[1]


def a_row(recipe: str, **numbers: Any) -> Row:
    return replace(Row(recipe, "w4a8", "key", 20.0, 10.0, 30.0, 25.0, 2.0, 0.15, 60.0, "54/5", 2), **numbers)


def test_the_page_says_who_beats_its_baseline() -> None:
    method = replace(RECIPES["w8a8"], name="method", baseline="w8a8", claim="w4a8")
    recipes = {"w8a8": RECIPES["w8a8"], "method": method}
    rows = {name: a_row(name, sqnr=db, psnr=2 * db) for name, db in (("w8a8", 20.0), ("method", 21.5))}
    text = page(list(rows.values()), "two pictures", recipes)
    assert "+1.5 / +3.0 `w8a8`" in text and "two pictures" in text
    assert "`method` at W4A8: better than `w8a8` in the prediction (21.50 against 20.00 dB" in text
    worse = page([rows["w8a8"], replace(rows["method"], sqnr=19.0)], "", recipes)
    assert "`method` at W4A8: NOT better than" in worse
    hardly = page([rows["w8a8"], replace(rows["method"], sqnr=20.05)], "", recipes)
    assert "`method` at W4A8: NOT better than" in hardly, "calibrations differ by as much"
    refused = page([a_row("method", refused="nothing to split", sqnr=None, psnr=None)], "", recipes)
    assert "| `method` | nothing to split |" in refused


def test_a_width_sets_every_pass_that_has_one(board: ModuleType) -> None:
    options = [p.options() for p in board.at_width(RECIPES["w8a8"], "w4a8").passes if p.name == "choose_scales"]
    assert [(o["weight_bits"], o["activation_bits"]) for o in options] == [(4, 8)]
