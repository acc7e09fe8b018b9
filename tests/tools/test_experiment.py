"""tools/experiment.py: small experiments that are stopped and go on, their tables, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.passes.recipes.catalog import RECIPES
from tests.helpers.feature_nets import feature_net
from tests.helpers.tiny import tiny_model
from tools.experiment import main
from tools.experiment_file import Claim, Experiment, NoiseExperiment, read_experiment
from tools.experiment_grid import Cell, gains_of, lines_of
from tools.leaderboard_page import Row
from tools.pieces import ROOT

TEXT = """
name: small
models: [{model: unet.onnx, scheduler: cosine, name: tiny}]
recipes: [higgs]
widths: [w4a8]
claims: [{recipe: w8a8, over: higgs, width: w4a8, least: 90}]
seeds: [0, 1]
images: 2
calibration: 2
batch: 2
steps: 3
"""
NOISE = """
kind: noise
name: noisy
model: {name: tiny, scheduler: cosine}
features: features.onnx
samplers: [{sampler: ddpm, steps: 3}]
weight_bits: [4]
parts: [none, all]
images: 8
calibration: 2
"""


def run(file: Path, *more: str) -> int:
    return main([str(file), "--folder", str(file.parent / "out"), *more])


def test_it_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ir.save(tiny_model(), tmp_path / "unet.onnx")
    file, out = tmp_path / "e.yaml", tmp_path / "out"
    file.write_text(TEXT, encoding="utf-8")
    assert run(file) == 0
    facts = json.loads((out / "results.json").read_text())
    assert [(line["recipe"], line["width"], line["seeds"]) for line in facts["lines"]] == [
        ("higgs", "w4a8", 2),
        ("w8a8", "w4a8", 2),
    ]
    plain = facts["lines"][1]["psnr"]
    assert plain["low"] <= plain["value"] <= plain["high"]
    rows = {(row["seed"], row["row"]["recipe"]): row["row"] for row in facts["rows"]}
    one, other = rows[0, "w8a8"], rows[1, "w8a8"]
    assert one["images"] != other["images"] and one["key"] != other["key"]
    assert (out / "plots.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "results.md").read_text()
    assert f"| tiny | w8a8 | w4a8 | 2 | {plain['value']:.1f} |" in page
    assert "claim of at least +90: does not hold |" in page and "| tiny | higgs | w8a8 | w4a8 | 2 |" in page

    (out / "tiny" / "rows" / "w8a8-w4a8-seed1.json").unlink()
    capsys.readouterr()
    assert run(file) == 0
    assert "[1/1] tiny, seed 1: w8a8-w4a8-seed1" in capsys.readouterr().out
    again = json.loads((out / "results.json").read_text())
    assert again["lines"] == facts["lines"]

    # A leaderboard: its page is written, and a new folder starts from the record beside it.
    board = TEXT.replace("seeds: [0, 1]", "pages: docs")
    file.write_text(board, encoding="utf-8")
    assert run(file, "--write-only") == 0
    assert "`w8a8`" in (tmp_path / "docs" / "leaderboard-tiny.md").read_text()
    capsys.readouterr()
    assert main([str(file), "--folder", str(tmp_path / "new")]) == 0
    assert "[1/" not in capsys.readouterr().out and (tmp_path / "new" / "results.md").is_file()


def test_the_noise_correction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ir.save(tiny_model(), tmp_path / "unet.onnx")
    feature_net(tmp_path / "features.onnx")
    file, out = tmp_path / "e.yaml", tmp_path / "out"
    file.write_text(NOISE, encoding="utf-8")
    given = ("--model-path", f"tiny={tmp_path / 'unet.onnx'}")
    assert run(file, *given) == 0
    none, corrected = json.loads((out / "results.json").read_text())["lines"]
    assert (none["part"], corrected["part"]) == ("none", "all") and none["psnr"] != corrected["psnr"]
    for line in (none, corrected):
        assert all(line[name]["low"] <= line[name]["value"] <= line[name]["high"] for name in ("psnr", "same"))
        assert line["frechet"]["value"] > 0 and (line["sampler"], line["weights"]) == ("ddpm, 3 steps", 4)
    page = (out / "results.md").read_text()
    assert "| ddpm, 3 steps | W4A8 | all | 1 |" in page and (out / "plots.png").is_file()
    drawn = sorted(out.rglob("000000.npy"))
    (out / "rows" / "ddpm-3-seed0.json").unlink()
    stamps = [chunk.stat().st_mtime_ns for chunk in drawn]
    capsys.readouterr()
    assert run(file, *given) == 0 and "[1/1] ddpm-3-seed0" in capsys.readouterr().out
    assert len(drawn) == 3 and stamps == [chunk.stat().st_mtime_ns for chunk in drawn], "images are drawn once"
    assert (out / "results.md").read_text() == page


def test_an_interval_covers_seeds_and_images() -> None:
    rng = np.random.default_rng(0)
    noise = [30 + rng.random(20) for _ in range(4)]
    near = [Cell("m", s, Row("w8a8", "w4a8", "", images=tuple(noise[s]))) for s in range(4)]
    apart = [Cell("m", s, Row("gptq", "w4a8", "", images=tuple(noise[s] + 3 * s + 1))) for s in range(4)]
    refused = [Cell("m", 0, Row("obc", "w4a8", "", refused="it cannot"))]
    b, c, a = lines_of([*near, *apart, *refused])
    assert a.psnr is not None and a.psnr.low is not None and a.psnr.high is not None
    assert b.psnr is not None and b.psnr.low is not None and b.psnr.high is not None
    assert a.psnr.high - a.psnr.low < 0.5 and b.psnr.high - b.psnr.low > 2
    assert (c.psnr, c.refused) == (None, "it cannot")

    claims = [Claim(recipe="gptq", over="w8a8", width="w4a8", least=least) for least in (0.5, 5, 20)]
    for claim, word in zip(claims, ("holds", "not shown", "does not hold"), strict=True):
        (gain,) = gains_of([*near, *apart, *refused], [claim])
        assert gain.verdict == f"claim of at least {claim.least:+g}: {word}" and gain.images.value == pytest.approx(5.5)
    (gain,) = gains_of([*near, *apart], [])
    assert (gain.recipe, gain.over, gain.verdict) == ("gptq", "w8a8", "better")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("name: small", "name: ../x"), "name: String should match"),
        (("seeds: [0, 1]", "seeds: []"), "seeds: List should have"),
        (("steps", "step"), "step: Extra inputs"),
        (("recipes: [higgs]", "recipes: [w9a9]"), "recipes: there is no 'w9a9'"),
        (("widths: [w4a8]", "widths: [w1a1]"), "widths: there is no 'w1a1'"),
        (("over: higgs", "over: none"), "claims: over: there is no 'none'"),
        (("models: [", "models: [["), "the experiment cannot be read"),
        (("model: unet.onnx, ", ""), "the model 'tiny' lies outside of the repository"),
        (("name: tiny", "name: digits"), "'digits' is the name of the embedded digits"),
        (("{model: unet.onnx, scheduler: cosine, name: tiny}", "3"), "models.0: keys with values are expected"),
        (("images: 2", "images: 0"), "images: Input should be greater"),
        (("images: 2", "pages: docs"), "rows of one seed"),
        (("name: small", "kind: other\nname: small"), "kind: there is no 'other'"),
        (("name: small", "kind: noise\nname: small"), "samplers: Field required"),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, change: tuple[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.yaml").write_text(TEXT.replace(*change), encoding="utf-8")
    assert run(tmp_path / "e.yaml") == 2
    said = capsys.readouterr().err
    assert words in said and "pydantic" not in said and not (tmp_path / "out").exists()


def test_model_paths_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.yaml").write_text(NOISE, encoding="utf-8")
    for given, words in (
        ("tiny", "'tiny' names no model"),
        ("other=x.onnx", "no model without a path is called 'other'"),
        ("tiny=x.onnx", "there is no such file"),
    ):
        assert run(tmp_path / "e.yaml", "--model-path", given) == 2 and words in capsys.readouterr().err


def test_the_files_of_the_project() -> None:
    """Each can be read; the leaderboards have all claims of the catalog, without a list of their own."""
    found = {file.stem: read_experiment(file) for file in sorted((ROOT / "tools" / "experiments").glob("*.yaml"))}
    assert len(found) == 8 and all(name == experiment.name for name, experiment in found.items())
    claims = {(recipe.name, recipe.claim) for recipe in RECIPES.values() if recipe.claim}
    for experiment in found.values():
        if isinstance(experiment, Experiment) and experiment.pages is not None:
            assert set(experiment.rows) == claims and not experiment.claims
        else:
            assert isinstance(experiment, NoiseExperiment) or experiment.claims
