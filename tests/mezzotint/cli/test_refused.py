"""What passes could not do reaches the user: in the manifest, and on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from mezzotint import compile_model
from tests.helpers.models import SMALL, Cli, hand_written, write

RECIPE = """name: equalized
extends: w8a8
passes: [normalize, freeze_time, lower_norms, equalize_weights, observe, choose_scales, insert_qdq, clean_qdq]
"""


def test_refusals_are_told_with_their_reasons(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    source = write(hand_written(), tmp_path / "m.onnx")
    bundle = compile_model(source, tmp_path / "b", recipe=str(tmp_path / "recipe.yaml"), **SMALL)
    refused = bundle.manifest.refused
    assert "SiLU" in refused["h1.act"] and refused["x"] == "'x' is an input of the graph"
    said = cli("inspect", bundle.path)
    assert said.code == 0 and "left unchanged by a rewriting pass" in said.out and "h1.act" in said.out
    assert json.loads(cli("inspect", bundle.path, "--json").out)["refused"] == refused


def test_nothing_is_said_where_nothing_was_refused(tmp_path: Path, cli: Cli) -> None:
    source = write(hand_written(), tmp_path / "m.onnx")
    bundle = compile_model(source, tmp_path / "b", recipe="w8a8", **SMALL)
    assert bundle.manifest.refused == {}
    assert "left unchanged by a rewriting pass" not in cli("inspect", bundle.path).out
