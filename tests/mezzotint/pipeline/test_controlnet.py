"""A pipeline with a ControlNet, from a diffusers folder to images: by `load`, by the loop, and beside diffusers."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from mezzotint import open_bundle
from mezzotint.cluster.driver import Cluster
from mezzotint.cluster.placement import CarriedFolder
from mezzotint.compiler.errors import ConditionError, ModelError
from mezzotint.diffusers import load
from mezzotint.pipeline.control_images import control_images, line_drawing, read_control
from mezzotint.pipeline.controlnet import pipeline_control
from mezzotint.pipeline.source import pipeline_source
from mezzotint.prompts.pipeline import prompt_pipeline
from mezzotint.runtime.bundle.controlnet import MIDDLE, open_controlnet
from mezzotint.runtime.bundle.pipeline import PipelineFolder
from mezzotint.runtime.errors import BundleError, CompileWarning, InputError
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.shards.carried import CarriedBundle
from mezzotint.whole import ComponentOptions, compile_pipeline
from tests.helpers import pipelines
from tests.helpers.models import Cli
from tests.helpers.whole import CALL, GUIDANCE, STEPS, Whole, exports, options

SIDE = 8  # of pictures and latents
EXACT = 1e-4
IMAGES = np.stack([line_drawing(20 + i, SIDE, SIDE) for i in range(2)])
IMAGE = torch.from_numpy(IMAGES[:1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionControlNetPipeline whose other parts are those of the fixture `whole`."""
    folder = tmp_path_factory.mktemp("controlled")
    pipelines.controlled(pipelines.smallest(folder)).save_pretrained(folder / "source")
    return folder / "source"


@pytest.fixture(scope="module")
def controlled(whole: Whole, source: Path) -> PipelineFolder:
    with exports(whole.exported), pytest.warns(CompileWarning, match="line drawings"):
        return compile_pipeline(source, source.parent / "float", options("float"), threads=1)


@pytest.fixture(scope="module")
def own(source: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)


def drawn(pipe: Any, kind: str = "latent", **call: Any) -> npt.NDArray[np.float32]:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    sizes = {"height": SIDE, "width": SIDE, "image": IMAGE}
    return np.asarray(pipe(**{**CALL, **sizes, **call}, output_type=kind, generator=generator).images, np.float32)


def test_it_draws_what_diffusers_draws(controlled: PipelineFolder, own: Any) -> None:
    mine = load(controlled, threads=1)
    assert type(mine) is diffusers.StableDiffusionControlNetPipeline
    calls: tuple[dict[str, Any], ...] = (
        {},
        {"kind": "np"},
        {"controlnet_conditioning_scale": 0.5, "guess_mode": True},
        {"control_guidance_end": 0.5},
    )
    for call in calls:
        expected = drawn(own, **call)
        assert np.abs(drawn(mine, **call) - expected).max() <= EXACT * np.abs(expected).max(), call
    whole = drawn(mine)
    others: tuple[dict[str, Any], ...] = (
        {"image": torch.from_numpy(IMAGES[1:])},
        {"controlnet_conditioning_scale": 0.5},
    )
    for other in others:
        assert np.abs(drawn(mine, **other) - whole).max() > 100 * EXACT, other
    with pytest.raises(InputError, match="cannot use cross_attention_kwargs"):
        drawn(mine, cross_attention_kwargs={"scale": 1.0})


def test_the_loop_of_the_bundle_draws_the_same(controlled: PipelineFolder, own: Any) -> None:
    """Without diffusers' loop: the residuals are conditions that the ControlNet computes at each call."""
    bundle = open_bundle(controlled.path)
    assert bundle.condition_network is not None and bundle.path == controlled.bundle.path
    with torch.no_grad():
        prompt, empty = (t.numpy() for t in own.encode_prompt(CALL["prompt"], "cpu", 1, True))
    rows: dict[str, Any] = {"encoder_hidden_states": prompt, "controlnet_cond": IMAGES}
    found = bundle.sample(2, seed=4, conditions=rows, unconditional={"encoder_hidden_states": empty}, threads=1)
    noise = torch.from_numpy(initial_noise(4, (2, 4, SIDE, SIDE)))
    pair: dict[str, Any] = {"prompt": [CALL["prompt"]] * 2, "image": torch.from_numpy(IMAGES)}
    expected = drawn(own, latents=noise, **pair)
    assert np.abs(found - expected).max() <= EXACT * np.abs(expected).max()
    halved = open_controlnet(controlled.path / "controlnet", rows={"controlnet_cond": IMAGES}, scale=0.5, threads=1)
    del rows["controlnet_cond"]
    weaker = bundle.fed_by(halved).sample(2, seed=4, conditions=rows, unconditional={"encoder_hidden_states": empty})
    expected = drawn(own, latents=noise, controlnet_conditioning_scale=0.5, **pair)
    assert np.abs(weaker - expected).max() <= EXACT * np.abs(expected).max()
    with pytest.raises(InputError, match="reads 'controlnet_cond', of which there are no rows"):
        bundle.sample(1, conditions=rows, unconditional={"encoder_hidden_states": empty})
    with pytest.raises(InputError, match=MIDDLE):
        open_bundle(controlled.path / "unet").sample(1, conditions=rows, unconditional=rows)


@pytest.mark.parametrize("shared_disk", [True, False])
def test_workers_of_a_cluster_draw_the_same(
    controlled: PipelineFolder, own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_disk: bool
) -> None:
    """The ControlNet travels with the bundle, through the object store where the disk is another one.

    It is that of the pipeline's folder, whose threads are not given, or one that was opened with a scale.
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with torch.no_grad():
        prompt, empty = (t.numpy() for t in own.encode_prompt(CALL["prompt"], "cpu", 1, True))
    rows: dict[str, Any] = {
        "conditions": {"encoder_hidden_states": prompt},
        "unconditional": {"encoder_hidden_states": empty},
    }
    own_rows = {"controlnet_cond": IMAGES}
    whole = open_bundle(controlled.path)
    assert whole.condition_network is not None
    halved = open_controlnet(controlled.path / "controlnet", rows=own_rows, scale=0.5, threads=1)
    fed = whole.fed_by(whole.condition_network.with_rows(own_rows) if shared_disk else halved)
    stored: dict[str, bytes] = {}

    class Elsewhere:
        """What a cluster does with a folder."""

        def carried(self, folder: Path, names: Sequence[str], digest: str) -> CarriedFolder:
            if shared_disk:
                return CarriedFolder(str(folder), digest)
            stored.update({f"{folder}/{name}": (folder / name).read_bytes() for name in names})
            return CarriedFolder("/nowhere", digest, {name: f"{folder}/{name}" for name in names})

    carried = pickle.loads(pickle.dumps(CarriedBundle.of(fed, cast(Cluster, Elsewhere()))))
    opened = carried.open(stored.__getitem__, 1)
    assert (opened.path == fed.path) == shared_disk
    np.testing.assert_array_equal(opened.sample(2, seed=4, threads=1, **rows), fed.sample(2, seed=4, threads=1, **rows))


def test_the_manifest_and_the_card_have_the_controlnet(controlled: PipelineFolder) -> None:
    entry = controlled.manifest.components["controlnet"]
    assert entry.class_name == "ControlNetModel" and entry.form == "float" and entry.integer == 0
    assert set(entry.sqnr_db) == {"down_block_additional_residuals", MIDDLE} and entry.worst_db > 80
    assert "line drawings" in entry.data and "--control-image" in (controlled.path / "README.md").read_text("utf-8")
    assert controlled.index["controlnet"] == ["diffusers", "ControlNetModel"]
    prompts = controlled.bundle.manifest.calibration.prompts
    assert prompts["pipeline"] == "StableDiffusionPipeline" and prompts["count"] == 4


def test_the_command_line_draws_with_an_image(
    controlled: PipelineFolder, own: Any, whole: Whole, tmp_path: Path, cli: Cli
) -> None:
    control, image = tmp_path / "edges.png", tmp_path / "image.png"
    Image.fromarray(np.uint8(IMAGES[0].transpose(1, 2, 0) * 255)).save(control)
    arguments = ("sample", controlled.path, "--prompt", CALL["prompt"], "--seed", 3, "--threads", 1, "-o", image)
    read = ("--control-image", control)
    assert json.loads(cli(*arguments, *read, "--json").out)["steps"] == STEPS
    pixels = np.asarray(Image.open(image), np.float32)
    assert np.abs(pixels - np.rint(drawn(own, "np")[0] * 255)).max() <= 1
    assert "reads an image" in cli(*arguments).err
    assert "cannot be read" in cli(*arguments, "--control-image", controlled.path / "README.md").err
    assert "belongs to a prompt" in cli("sample", controlled.path, *read, "-o", image).err
    assert "has no ControlNet" in cli("sample", whole.floating.path, *arguments[2:], *read).err
    refused = cli("compile", whole.source, "-o", tmp_path / "out", "--control-images", tmp_path, "--quiet")
    assert refused.code == 2 and "has no ControlNet" in refused.err


def test_a_changed_controlnet_is_refused(controlled: PipelineFolder, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(controlled.path, tmp_path / "copy"))
    with (copy / "controlnet" / "model.onnx").open("ab") as file:
        file.write(b"more")
    with pytest.raises(BundleError, match="changed after"):
        open_bundle(copy)
    with pytest.raises(BundleError, match=r"no model\.onnx"):
        open_controlnet(copy / "unet" / "scheduler")
    with pytest.raises(BundleError, match="not that of a ControlNet"):
        open_controlnet(copy / "text_encoder")


@pytest.mark.parametrize(
    ("changes", "index", "words"),
    [
        ({"global_pool_conditions": True}, {}, "means over the image"),
        ({"class_embed_type": "timestep"}, {}, "takes class labels"),
        ({"addition_embed_type": "text"}, {}, "addition_embed_type 'text'"),
        ({"conditioning_channels": 1}, {}, "reads images of 1 channels"),
        ({"conditioning_embedding_out_channels": [4, 8]}, {}, "2 times as large as the latents, those of the VAE 1"),
        ({}, {"controlnet": ["diffusers", "MultiControlNetModel"]}, "controlnet is a MultiControlNetModel"),
        ({}, {"controlnet": ["diffusers", "AutoencoderKL"]}, "controlnet is a diffusers.AutoencoderKL"),
        ({}, {"_class_name": "StableDiffusionControlNetImg2ImgPipeline"}, "controlnet is a ControlNetModel"),
    ],
)
def test_a_controlnet_that_cannot_be_compiled_is_refused_by_name(
    source: Path, tmp_path: Path, changes: dict[str, Any], index: dict[str, Any], words: str
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    for file, values in ((copy / "controlnet" / "config.json", changes), (copy / "model_index.json", index)):
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}), encoding="utf-8")
    with warnings.catch_warnings(), pytest.raises(ModelError, match=words):
        warnings.simplefilter("ignore", CompileWarning)
        compile_pipeline(copy, tmp_path / "out", options("float"))
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_control_images_are_read_from_a_folder(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edges"
    folder.mkdir()
    for i in range(5):
        Image.new("L", (40, 20 + i), 50 * i).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    found = control_images(folder, 16, 24)
    assert found.own.shape == (3, 3, 16, 24) and found.held_out.shape == (2, 3, 16, 24)
    assert found.words == "3 control images, measured on 2 others"
    np.testing.assert_allclose(found.held_out[1], 200 / 255, atol=1e-6)
    one = control_images(folder / "1.png", 16, 24)
    assert one.own.shape == one.held_out.shape == (1, 3, 16, 24)
    known = pipeline_control(pipeline_source(source), folder, (16, 24), tmp_path / "model.onnx", 1)
    assert known.network.rows["controlnet_cond"].shape == (3, 3, 16, 24)
    assert prompt_pipeline(source).class_name == "StableDiffusionPipeline"
    for place, words in ((tmp_path / "none", "no such folder"), (tmp_path, "has no images")):
        with pytest.raises(ConditionError, match=words):
            control_images(place, 16, 24)
    with pytest.raises(InputError, match="cannot be read"):
        read_control(folder / "notes.txt", 16, 24)


def test_line_drawings_differ_and_are_lines() -> None:
    sheets = [line_drawing(i, 64, 48)[0] for i in range(8)]
    assert all(0.02 < sheet.mean() < 0.4 and set(np.unique(sheet)) == {0, 1} for sheet in sheets)
    assert all(np.abs(a - b).max() == 1 for a, b in pairwise(sheets))


def test_images_for_a_pipeline_without_a_controlnet_are_refused(whole: Whole, tmp_path: Path) -> None:
    parts = ComponentOptions(control_images=tmp_path)
    with pytest.raises(ConditionError, match="has no ControlNet"):
        compile_pipeline(whole.source, tmp_path / "out", options("float"), parts)
    assert GUIDANCE > 1 and not list(tmp_path.iterdir())
