"""tools/leaderboard.py: real rows on few pictures, a run that goes on where it stopped, and what the page says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mezzotint.bench import peers
from mezzotint.passes.recipes.catalog import RECIPES
from tests.helpers.labels import CLASSES, labelled
from tests.helpers.tiny import tiny_model
from tools.leaderboard import main
from tools.leaderboard_options import parsed
from tools.leaderboard_page import WIDTHS, Row, page
from tools.leaderboard_recipes import at_width, chosen_options
from tools.leaderboard_record import read_record, record_of, write_record

FEW = ["--images", "2", "--calibration", "2", "--steps", "3", "--batch", "2"]
WIDE = [*FEW, "--recipe", "w8a8", "--width", "w8a8", "--width", "w4a8", "--width", "w4a16"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    ir.save(tiny_model(), folder / "unet.onnx")
    options = [*WIDE, "--model", str(folder / "unet.onnx"), "--scheduler", "cosine"]
    assert main([*options, "--folder", str(folder), "--page", str(folder / "page.md")]) == 0
    return folder


def test_rows_are_measured(measured: Path) -> None:
    rows = {f.stem: json.loads(f.read_text()) for f in (measured / "rows").glob("*.json")}
    assert set(rows) == {"w8a8-w8a8", "w8a8-w4a8", "w8a8-w4a16", *(f"{peer}-w8a8" for peer in peers.available())}
    eight, four = rows["w8a8-w8a8"], rows["w8a8-w4a8"]
    assert eight["sqnr"] > four["sqnr"] + 5 > 5
    assert eight["speed"] > 0 and eight["size"] > four["size"] > 0
    assert eight["kernels"] == four["kernels"] and eight["islands"] == 2
    page = (measured / "page.md").read_text()
    assert "## W8A8" in page and "## W4A8" in page and "## W6A6" not in page
    assert f"| `w8a8` | {eight['psnr']:.1f} | {eight['psnr_p10']:.1f} | {eight['sqnr']:.1f} |" in page
    assert len(eight["images"]) == 2 and eight["psnr"] == pytest.approx(sum(eight["images"]) / 2)
    weight_only = rows["w8a8-w4a16"]
    assert weight_only["sqnr"] > four["sqnr"] and weight_only["size"] < eight["size"]
    assert weight_only["kernels"].startswith("0/") and "## W4A16" in page


def test_it_goes_on_where_it_stopped(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there is not measured again, what is missing is; the page says the same."""
    page = (measured / "page.md").read_text()
    (measured / "rows" / "w8a8-w4a8.json").unlink()
    record_of(measured / "page.md").unlink()
    kept = (measured / "rows" / "w8a8-w8a8.json").stat().st_mtime_ns
    options = [*WIDE, "--model", str(measured / "unet.onnx"), "--scheduler", "cosine"]
    assert main([*options, "--folder", str(measured), "--page", str(measured / "page.md")]) == 0
    said = capsys.readouterr().out
    assert "[1/1] w8a8-w4a8" in said
    assert (measured / "rows" / "w8a8-w8a8.json").stat().st_mtime_ns == kept
    columns = [
        [line.split("|")[2:6] for line in text.splitlines()] for text in (page, (measured / "page.md").read_text())
    ]
    assert columns[0] == columns[1]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A board of another model: a corrected recipe at its claim, and the baseline at the same eta."""
    folder = tmp_path_factory.mktemp("other")
    model = folder / "unet.onnx"
    ir.save(tiny_model(), model)
    options = [*FEW, "--recipe", "ptqd-w8a8", "--recipe", "w8a8", "--width", "w4a8", "--no-peers", "--no-speed"]
    options += ["--model", str(model), "--scheduler", "cosine", "--folder", str(folder)]
    assert main([*options, "--page", str(folder / "page.md")]) == 0
    return folder


def test_a_corrected_recipe_is_judged_at_the_eta_of_its_claim(other: Path) -> None:
    rows = {f.stem: json.loads(f.read_text()) for f in (other / "rows").glob("*.json")}
    assert {name: (row["eta"], row["corrected"]) for name, row in rows.items()} == {
        "ptqd-w8a8-w4a8-eta1": (1.0, True),
        "w8a8-w4a8-eta1": (1.0, False),
        "w8a8-w4a8": (0.0, False),
    }
    fitted, plain = rows["ptqd-w8a8-w4a8-eta1"], rows["w8a8-w4a8-eta1"]
    assert (fitted["kernels"], fitted["size"]) == (plain["kernels"], plain["size"]), "the same network"
    assert fitted["images"] != plain["images"] and fitted["sqnr"] != plain["sqnr"], "behind the correction"
    page = (other / "page.md").read_text()
    assert page.startswith("# Leaderboard: unet\n") and "digits" not in page
    assert "correction for `ptqd-w8a8`, at the eta" in page
    assert "## W4A8\n" in page and "## W4A8, eta 1\n" in page
    assert "- `ptqd-w8a8` at W4A8, eta 1: " in page


def test_a_cut_training_is_told_and_a_longer_one_replaces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ir.save(tiny_model(), tmp_path / "unet.onnx")
    options = [*FEW, "--model", str(tmp_path / "unet.onnx"), "--scheduler", "cosine", "--folder", str(tmp_path)]
    options += ["--page", str(tmp_path / "page.md"), "--no-peers", "--no-speed", "--width", "w4a4", "--recipe", "lsq"]
    for iterations, measured in ((3, True), (2, False), (4, True)):
        assert main([*options, "--iterations", str(iterations)]) == 0
        assert ("[1/1] lsq-w4a4" in capsys.readouterr().out) == measured
        row = Row.load(tmp_path / "rows" / "lsq-w4a4.json")
        assert row is not None and row.iterations == max(iterations, 3)
        assert f"| `lsq` cut to {row.iterations} iterations |" in (tmp_path / "page.md").read_text()


def test_a_board_of_classes_under_guidance(tmp_path: Path) -> None:
    """Labels of the configuration, and the same ones typed for a file that comes without it."""
    options = [*FEW, "--scheduler", "cosine", "--guidance", "3", "--recipe", "w8a8", "--width", "w8a8"]
    options += ["--no-peers", "--no-speed", "--name", "labelled"]
    alone = tmp_path / "alone" / "net.onnx"
    alone.parent.mkdir()
    alone.write_bytes(labelled(tmp_path).read_bytes())
    typed = ["--conditions", "class_labels=0,1,2", "--unconditional", f"class_labels={CLASSES}"]
    rows = []
    for model, more in ((tmp_path / "model.onnx", []), (alone, typed)):
        folder = tmp_path / model.stem
        places = ["--model", str(model), "--folder", str(folder), "--page", str(folder / "page.md")]
        assert main([*options, *places, *more]) == 0
        assert "guidance 3, 2 images" in (folder / "page.md").read_text()
        rows.append(Row.load(folder / "rows" / "w8a8-w8a8.json"))
    first, second = rows
    assert first is not None and second is not None and first.images == second.images
    assert second.key != first.key, "rows that were given are part of what identifies a measurement"
    assert main([*options, "--model", str(alone), "--folder", str(tmp_path / "none"), "--page", "x.md"]) == 2


def test_rows_of_other_options_or_models_are_not_listed(other: Path) -> None:
    options = [*FEW, "--model", str(other / "unet.onnx"), "--folder", str(other), "--page", str(other / "o.md")]
    page = other / "o.md"
    for change in (["--scheduler", "ddpm-linear"], ["--scheduler", "cosine", "--images", "4"]):
        assert main([*options, *change, "--write-only"]) == 0
        assert "| `w8a8` |" not in page.read_text()
    assert main([*options, "--scheduler", "cosine", "--write-only"]) == 0
    assert "| `w8a8` |" in page.read_text()
    ir.save(tiny_model(channels=3), other / "unet.onnx")
    assert main([*options, "--scheduler", "cosine", "--write-only"]) == 0
    assert "| `w8a8` |" not in page.read_text()


@pytest.mark.parametrize(
    ("model", "name", "stem"),
    [
        ("digits", None, "leaderboard"),
        ("digits", "quick", "leaderboard-quick"),
        ("a/unet.onnx", None, "leaderboard-unet"),
        ("a/mnist-onnx/model.onnx", None, "leaderboard-mnist-onnx"),
        ("a/faces/", None, "leaderboard-faces"),
    ],
)
def test_each_model_has_its_page_and_its_folder(model: str, name: str | None, stem: str) -> None:
    args, _ = parsed(["--model", model, *(["--name", name] if name else [])], None)
    assert (args.folder.name, args.page.name, args.threads) == (stem, f"{stem}.md", 2)
    assert parsed(["--cluster", "local"], None)[0].threads == 1, "the cores are shared among the rows"


@pytest.mark.parametrize(
    "options", [["--model", "a.onnx", "--name", "digits"], ["--name", "../x"], ["--batch", "0"], ["--iterations", "0"]]
)
def test_options_that_make_no_sense_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(options, None)


def test_the_digits_are_the_page_without_a_name(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert main(["--write-only", "--folder", str(tmp_path / "out"), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# Leaderboard\n") and "The embedded digits, ddim, 20 steps, eta 0, 32 images" in text


def test_a_model_that_is_missing_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "none.onnx", "--folder", str(tmp_path), "--page", str(tmp_path / "p.md")]) == 2
    assert "there is no such model" in capsys.readouterr().err and not (tmp_path / "p.md").exists()


def a_row(recipe: str, images: Sequence[float] | npt.NDArray[np.float64], **numbers: Any) -> Row:
    row = Row(
        recipe, "w4a8", "key", sqnr=20.0, worst=10.0, images=tuple(float(v) for v in images), speed=2.0, size=0.15
    )
    psnr, p10 = float(np.median(images)), float(np.percentile(images, 10, method="lower"))
    return replace(row, psnr=psnr, psnr_p10=p10, **numbers)


BASE = np.random.default_rng(0).normal(30, 4, 32)
NOISE = np.random.default_rng(1).normal(0, 1, 32)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (BASE + 2 + NOISE, "better than"),
        (BASE - 2 + NOISE, "worse than"),
        (BASE + 0.05 + NOISE, "not distinguishable from"),
        (np.where(np.arange(32) % 7 < 2, BASE - 15, BASE + 2), "better in the median and worse in the 10th"),
    ],
)
def test_images_decide_who_beats_its_baseline(images: npt.NDArray[np.float64], words: str) -> None:
    """The interval of the paired differences decides; epsilon is beside it, whatever it says."""
    method = replace(RECIPES["w8a8"], name="method", baseline="w8a8", claim="w4a8")
    recipes = {"w8a8": RECIPES["w8a8"], "method": method}
    for sqnr, gain in ((22.5, "+2.5"), (19.0, "-1.0")):
        rows = [a_row("w8a8", BASE), a_row("method", images, sqnr=sqnr)]
        text = page(rows, "digits", "32 images", recipes)
        assert f"- `method` at W4A8: {words}" in text and f"epsilon {gain} dB" in text and "32 images" in text
        assert f"/ {gain} `w8a8` |" in text


def test_tables_are_sorted_by_images() -> None:
    rows = [
        a_row("gptq", BASE, sqnr=40.0),
        a_row("w8a8", BASE + 1, sqnr=10.0),
        replace(a_row("tdq", BASE), psnr=None, psnr_p10=None, images=(None,) * 32),  # no difference at all
        Row("comq", "w4a8", "key", refused="nothing to round"),
        Row("obc", "w4a8", "key", refused="nothing to round"),
    ]
    text = page(rows, "digits", "", RECIPES)
    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert listed == ["tdq", "w8a8", "gptq"]
    assert "Refused, `comq`, `obc`: nothing to round." in text
    assert "- `gptq` at W4A8: worse than `w8a8`" in text
    apart = page([a_row("gptq", BASE[:8]), a_row("w8a8", BASE)], "digits", "", RECIPES)
    assert "- `gptq`" not in apart, "not the same images"


def test_a_new_folder_starts_from_the_record_of_the_page(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page is the same from a folder that has measured nothing, and no row is measured again."""
    options = [*WIDE, "--no-speed", "--no-peers", "--model", str(measured / "unet.onnx"), "--scheduler", "cosine"]
    page = measured / "page.md"
    text = page.read_text()
    assert main([*options, "--folder", str(tmp_path), "--page", str(page)]) == 0
    assert page.read_text() == text and "[1/" not in capsys.readouterr().out
    rows = read_record(page)
    assert len(rows) == len(list((measured / "rows").iterdir())) and all(row.refused or row.images for row in rows)


def test_a_gain_is_that_of_the_record_where_images_are_gone(tmp_path: Path) -> None:
    recipes = {
        "w8a8": RECIPES["w8a8"],
        "method": replace(RECIPES["w8a8"], name="method", baseline="w8a8", claim="w4a8"),
    }
    rows, file = [a_row("w8a8", BASE), a_row("method", BASE + 2 + NOISE)], tmp_path / "page.md"
    write_record(file, rows, recipes)
    kept = [replace(row, images=()) for row in read_record(file)]
    assert page(kept, "digits", "", recipes) == page(rows, "digits", "", recipes)
    assert page([replace(row, gain=None) for row in kept], "digits", "", recipes).count("better") == 0


def test_what_is_no_record_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ('{"a": 1}', "[", "[1]", "3"):
        (tmp_path / "page.json").write_text(text)
        assert main(["--write-only", "--folder", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 2
        assert "record of the page cannot be read" in capsys.readouterr().err


def test_rows_of_another_shape_are_measured_anew(tmp_path: Path) -> None:
    row, file = a_row("gptq", BASE), tmp_path / "row.json"
    row.save(file)
    assert Row.load(file) == row
    data = json.loads(file.read_text())
    for text in (json.dumps({**data, "more": 1}), json.dumps([]), file.read_text()[:50]):
        file.write_text(text)
        assert Row.load(file) is None
    assert Row.load(tmp_path / "none.json") is None


def test_a_width_sets_every_pass_that_has_one() -> None:
    assert set(WIDTHS) == {"w8a8", "w6a6", "w4a8", "w3a8", "w2a8", "w1a8", "w4a6", "w4a4", "w4a16"}
    options = [p.options() for p in at_width(RECIPES["w8a8"], "w4a6").passes if p.name == "choose_scales"]
    assert [(o["weight_bits"], o["activation_bits"]) for o in options] == [(4, 6)]
    weight_only = {p.name: p.options() for p in at_width(RECIPES["q-diffusion"], "w4a16").passes}
    assert weight_only["choose_scales"]["activation_bits"] == "float"
    assert weight_only["split_shortcuts"]["activation_bits"] == 8, "a rewrite's choice has no float activations"


def test_a_key_has_the_options_that_are_not_defaults() -> None:
    chosen = dict(chosen_options(RECIPES["gpfq"]))
    assert chosen["round_weights"] == {"method": "comq", "sweeps": 1, "act_order": False}
    assert chosen["observe"] == {} and list(chosen) == [step.name for step in RECIPES["gpfq"].passes]
