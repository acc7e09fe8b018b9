"""tools/experiment.py: a small experiment that is stopped and goes on, its table, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.helpers.tiny import tiny_model
from tools.experiment import Cell, lines_of, main
from tools.leaderboard_page import Row

TEXT = """
name: small
models: [{model: unet.onnx, scheduler: cosine, name: tiny}]
recipes: [w8a8]
widths: [w8a8, w4a8]
seeds: [0, 1]
images: 2
calibration: 2
batch: 2
steps: 3
"""


def test_it_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ir.save(tiny_model(), tmp_path / "unet.onnx")
    (tmp_path / "e.yaml").write_text(TEXT, encoding="utf-8")
    words = [str(tmp_path / "e.yaml"), "--folder", str(tmp_path / "out")]
    assert main(words) == 0
    facts = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(line["recipe"], line["width"], line["seeds"]) for line in facts["lines"]] == [
        ("w8a8", "w4a8", 2),
        ("w8a8", "w8a8", 2),
    ]
    four, eight = facts["lines"]
    assert four["low"] <= four["psnr"] <= four["high"] < eight["low"]
    rows = {(row["seed"], row["row"]["width"]): row["row"] for row in facts["rows"]}
    assert rows[0, "w8a8"]["images"] != rows[1, "w8a8"]["images"] and rows[0, "w8a8"]["key"] != rows[1, "w8a8"]["key"]
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "results.md").read_text()
    assert f"| tiny | w8a8 | w4a8 | 2 | {four['psnr']:.1f} |" in page

    (tmp_path / "out" / "tiny" / "seed-1" / "rows" / "w8a8-w4a8.json").unlink()
    capsys.readouterr()
    assert main(words) == 0
    assert "seed 1: [1/1] w8a8-w4a8" in capsys.readouterr().out
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["lines"] == facts["lines"]
    assert main([*words, "--write-only"]) == 0
    assert (tmp_path / "out" / "results.md").read_text() == page


def test_an_interval_covers_seeds_and_images() -> None:
    rng = np.random.default_rng(0)
    near = [Cell("m", s, Row("a", "w", "", images=tuple(30 + rng.random(20)))) for s in range(4)]
    apart = [Cell("m", s, Row("b", "w", "", images=tuple(30 + 3 * s + rng.random(20)))) for s in range(4)]
    refused = [Cell("m", 0, Row("c", "w", "", refused="it cannot"))]
    a, b, c = lines_of([*near, *apart, *refused])
    assert a.low is not None and a.high is not None and b.low is not None and b.high is not None
    assert a.high - a.low < 0.5 and b.high - b.low > 2
    assert (c.psnr, c.refused) == (None, "it cannot")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("name: small", "name: ../x"), "name: String should match"),
        (("seeds: [0, 1]", "seeds: []"), "seeds: List should have"),
        (("steps", "step"), "step: Extra inputs"),
        (("[w8a8]", "[w9a9]"), "recipes: there is no 'w9a9'"),
        (("w4a8]", "w1a1]"), "widths: there is no 'w1a1'"),
        (("models: [", "models: [["), "the experiment cannot be read"),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, change: tuple[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.yaml").write_text(TEXT.replace(*change), encoding="utf-8")
    assert main([str(tmp_path / "e.yaml"), "--folder", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and "pydantic" not in said and not (tmp_path / "out").exists()
