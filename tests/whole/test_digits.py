"""The embedded digits on the command line, end to end: compile, sample, inspect; and how good the pictures are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from PIL import Image

from mezzotint import Bundle, open_bundle
from mezzotint.bench.pairs import compare
from mezzotint.compiler.graph.blocks import find_blocks
from mezzotint.compiler.graph.residuals import LAYER_WEIGHTS
from mezzotint.compiler.graph.scopes import name_by_module
from mezzotint.io.sources import DIGITS
from tests.helpers.models import THREADS, Cli

ROOT = Path(__file__).parents[2]
STEPS, CALIBRATION, IMAGES = 10, 4, 8
# Medians over 8 pictures of 10 steps; measured 39.3 dB and 26.5 dB. With 6-bit activations: 28.6 dB and 15.6 dB.
PSNR_DB = 35.0
SQNR_DB = 23.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    """What a fresh process says that compiles the digits, in JSON."""
    options = {"--steps": STEPS, "--calibration-samples": CALIBRATION, "--threads": THREADS, "-o": folder / "bundle"}
    command = [sys.executable, "-m", "mezzotint", "compile", "digits", "--json", "--dump-passes"]
    command += [str(word) for pair in options.items() for word in pair]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def bundle(said: dict[str, Any]) -> Bundle:
    return open_bundle(said["bundle"])


@pytest.fixture(scope="module")
def float_model(bundle: Bundle) -> Path:
    """The imported graph, which --dump-passes kept."""
    return bundle.path / "passes" / "000_imported.onnx"


def quality(bundle: Bundle, float_model: Path) -> tuple[float, float]:
    """Medians in dB: PSNR of pictures, pooled SQNR of epsilon."""
    found = compare(bundle, float_model, IMAGES, threads=THREADS)
    return float(np.median(found.psnr)), found.sqnr.pooled()


def test_compile_says_what_came_out(said: dict[str, Any], bundle: Bundle) -> None:
    assert said["recipe"] == "w8a8-best"
    assert (said["integer_kernels"], said["float_kernels"]) == (54, 5)
    assert len(said["islands"]) == 5
    assert said["model_bytes"] < 0.28 * said["parameter_bytes_before"]
    assert said["digest"] == bundle.manifest.digest
    assert len(bundle.deployed_timesteps or ()) == STEPS


def test_every_node_of_a_compiled_model_has_a_place_and_a_name_of_its_own(bundle: Bundle) -> None:
    graph = ir.load(bundle.model_path).graph
    found = [node.name or "" for node in graph]
    assert max(Counter(found).values()) == 1
    placed = Counter(name.partition("/")[0] for name in found if "/" in name)
    assert {"conv_in", "down_blocks.0", "mid_block", "up_blocks.2", "conv_out", "tables"} <= set(placed)
    assert sum(placed.values()) >= 0.98 * len(found)
    layers = bundle.manifest.kernels.layers
    assert set(layers) <= set(found)
    assert "mid_block/resnets.0/conv1/Conv" in layers


def test_every_pass_is_dumped_as_a_model_that_opens(bundle: Bundle) -> None:
    folder = bundle.path / "passes"
    stems = [f"{i + 1:03d}_{record.name}" for i, record in enumerate(bundle.manifest.history)]
    for stem in ["000_imported", *stems]:
        onnx.checker.check_model(str(folder / f"{stem}.onnx"))
        assert (folder / f"{stem}.txt").stat().st_size > 1000
        assert (folder / f"{stem}.diff").exists()
    assert "QuantizeLinear" in (folder / f"{stems[-2]}.diff").read_text()


def test_pictures_stay_close_to_float(bundle: Bundle, float_model: Path) -> None:
    psnr, sqnr = quality(bundle, float_model)

    assert psnr > PSNR_DB
    assert sqnr > SQNR_DB


def test_coarser_activations_fall_below_the_bound(cli: Cli, folder: Path, float_model: Path) -> None:
    words = ["--scheduler", DIGITS / "scheduler", "--size", "32x32", "--recipe", "w8a8"]
    words += ["--set", "choose_scales.activation_bits=4"]
    options = ["--steps", STEPS, "--calibration-samples", CALIBRATION, "--threads", THREADS, "--json"]
    answer = cli("compile", float_model, "-o", folder / "coarse", *words, *options)
    assert answer.code == 0, answer.err

    psnr, sqnr = quality(open_bundle(folder / "coarse"), float_model)

    assert psnr < PSNR_DB
    assert sqnr < SQNR_DB


def test_pictures_are_digits(bundle: Bundle) -> None:
    """White strokes on black: bright pixels are few, dark ones many, the border is black."""
    images = bundle.sample(IMAGES, threads=THREADS)

    assert images.dtype == np.float32
    assert (np.abs(images) <= 1).all()
    bright = (images > 0).mean(axis=(1, 2, 3))
    assert ((bright > 0.02) & (bright < 0.35)).all()
    assert (images < -0.8).mean() > 0.6
    assert images[:, :, :2].max() < 0
    assert images[..., -2:].max() < 0


@pytest.mark.parametrize(
    ("options", "sampler", "eta"),
    [((), "ddim", 0.0), (("--sampler", "ddpm"), "ddpm", 0.0), (("--eta", "0.7"), "ddim", 0.7)],
)
def test_sample_writes_what_the_api_draws(
    cli: Cli, bundle: Bundle, tmp_path: Path, options: tuple[str, ...], sampler: str, eta: float
) -> None:
    common = ["-n", 4, "--seed", 3, "--batch", 3, "--threads", THREADS, "--json", *options]
    raw, png = tmp_path / "new" / "raw.npy", tmp_path / "grid.png"
    answers = [cli("sample", bundle.path, "-o", path, *common) for path in (raw, png)]

    assert [a.code for a in answers] == [0, 0], answers
    summary = json.loads(answers[0].out)
    assert (summary["pictures"], summary["sampler"], summary["eta"], summary["steps"]) == (4, sampler, eta, STEPS)
    assert summary["correction"] is False
    images: npt.NDArray[np.float32] = np.load(raw)
    expected = bundle.sample(4, sampler=sampler, eta=eta, seed=3, batch=3, threads=THREADS)
    np.testing.assert_array_equal(images, expected)
    with Image.open(png) as grid:
        assert grid.size == (2 * 34 + 2, 2 * 34 + 2)
        shown = np.asarray(grid)[2:34, 2:34].astype(float)
    np.testing.assert_allclose(shown, (images[0, 0] + 1) * 127.5, atol=0.51)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0)])
def test_a_picture_does_not_depend_on_its_batch(bundle: Bundle, sampler: str, eta: float) -> None:
    parts = bundle.sample(5, sampler=sampler, eta=eta, steps=5, batch=2, threads=THREADS)
    whole = bundle.sample(5, sampler=sampler, eta=eta, steps=5, batch=5, threads=THREADS)
    other = bundle.sample(5, sampler=sampler, eta=eta, steps=5, seed=1, threads=THREADS)

    np.testing.assert_allclose(parts, whole, atol=1e-3)
    assert np.abs(other - whole).max() > 0.5


def test_steps_that_are_not_deployed_are_refused(cli: Cli, bundle: Bundle, tmp_path: Path) -> None:
    answer = cli("sample", bundle.path, "-o", tmp_path / "x.png", "--steps", 7)

    assert answer.code == 2
    assert "7 steps of ddim call timestep 852, for which this bundle has no row" in answer.err
    assert "these numbers of steps work: 1, 2, 5, 10" in answer.err
    assert not (tmp_path / "x.png").exists()


def test_inspect_tells_people_and_programs(cli: Cli, bundle: Bundle) -> None:
    text = cli("inspect", bundle.path)
    data = json.loads(cli("inspect", bundle.path, "--json").out)

    assert text.code == 0
    for word in (
        "w8a8-best",
        "54 integer, 5 float",
        "freeze_time",
        "choose_scales",
        "layers in float",
        "ddim, 10 steps",
    ):
        assert word in text.out, word
    assert len(text.out.splitlines()) <= 120  # two screens
    everything = cli("inspect", bundle.path, "--all").out
    assert all(q.site in everything for q in bundle.manifest.quantizers)
    assert data["digest"] == bundle.manifest.digest
    assert data["kernels"]["integer"] == 54
    assert data["corrected"] is False
    assert {q["format"] for q in data["quantizers"]} == {"uint8", "int8"}


@pytest.mark.parametrize("written", [False, True], ids=["imported", "written"])
def test_blocks_are_the_same_with_and_without_the_names_of_modules(
    bundle: Bundle, float_model: Path, written: bool
) -> None:
    model = ir.load(bundle.model_path if written else float_model)
    name_by_module(model.graph)  # as normalize does
    blocks = find_blocks(model, "sample")
    resnets = {"mid_block/resnets.0", "mid_block/resnets.1", *(f"down_blocks.{i}/resnets.0" for i in range(3))}
    resnets |= {f"up_blocks.{i}/resnets.{j}" for i in range(3) for j in range(2)}
    attentions = {
        f"{part}/attentions.{i}"
        for part, i in zip(("down_blocks.2", "mid_block", *["up_blocks.0"] * 2), "0001", strict=True)
    }
    assert {block.name for block in blocks if len(block.layers) > 1} == resnets | attentions
    assert {"conv_in/Conv", "conv_out/Conv", "up_blocks.1/upsamplers.0/conv/Conv"} <= {b.name for b in blocks}
    names = {node: node.name for node in model.graph}
    for node in model.graph:
        node.name = None
    layers = [{names[n] for n in block.nodes if n.op_type in LAYER_WEIGHTS} for block in find_blocks(model, "sample")]
    assert layers == [set(block.layers) for block in blocks]
