"""Whole pipelines: from a diffusers folder to images, by `load`, by the command line, and beside diffusers itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from mezzotint import open_bundle
from mezzotint.compiler.bundle.staging import foreign_part
from mezzotint.compiler.errors import ConditionError, ModelError, OutputError
from mezzotint.diffusers import load
from mezzotint.options import CalibrationOptions
from mezzotint.pipeline.preview import Preview
from mezzotint.pipeline.schedulers import sampler_for, scheduler_config
from mezzotint.pipeline.source import is_whole_pipeline, pipeline_source
from mezzotint.prompts.texts import held_out_prompts
from mezzotint.runtime.bundle.pipeline import open_pipeline
from mezzotint.runtime.compare import sqnr_db
from mezzotint.runtime.errors import BundleError, InputError
from mezzotint.whole import compile_pipeline
from tests.helpers.models import Cli
from tests.helpers.whole import CALL, STEPS, Whole, options
from tools.measure_wholes import WHOLE_RESULTS, WHOLES

EXACT = 1e-4
LEAST_DB = 30.0


def drawn(pipe: Any, kind: str, **call: Any) -> npt.NDArray[np.float32]:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return np.asarray(pipe(**{**CALL, **call}, output_type=kind, generator=generator).images, np.float32)


def own(whole: Whole) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(whole.source, torch_dtype=torch.float32)


def test_a_float_pipeline_draws_what_diffusers_draws(whole: Whole) -> None:
    mine, theirs = load(whole.floating.path, threads=1), own(whole)
    assert type(mine) is diffusers.StableDiffusionPipeline
    for kind in ("latent", "np"):
        expected = drawn(theirs, kind)
        assert np.abs(drawn(mine, kind) - expected).max() <= EXACT * np.abs(expected).max()
    other = drawn(mine, "np", prompt="an empty station")  # the prompt counts
    assert np.abs(other - drawn(mine, "np")).max() > 100 * EXACT


def test_an_int8_pipeline_is_near(whole: Whole) -> None:
    db = sqnr_db(drawn(own(whole), "latent"), drawn(load(whole.quantized.path, threads=1), "latent"))
    assert LEAST_DB < db < 80
    entries = whole.quantized.manifest.components
    assert set(entries) == {"text_encoder", "vae_decoder", "vae_encoder"}
    for entry in entries.values():
        assert entry.form == "int8" and entry.integer > 0 and LEAST_DB <= entry.worst_db < 80
        assert entry.bytes < whole.floating.manifest.components["vae_decoder"].bytes * 2
    assert any("attention" in reason for reason in entries["text_encoder"].islands.values())


def test_the_encoder_of_the_vae_gives_the_distribution_of_latents(whole: Whole) -> None:
    mine, theirs = load(whole.floating.path, threads=1).vae, own(whole).vae
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(picture).latent_dist
    found = mine.encode(picture).latent_dist
    assert torch.allclose(found.mean, expected.mean, atol=1e-5) and torch.allclose(found.std, expected.std, atol=1e-5)
    with pytest.raises(InputError, match="float32"):
        mine.half()


def test_hidden_states_of_a_text_encoder_come_when_they_are_asked_for(whole: Whole) -> None:
    mine, theirs = load(whole.floating.path, threads=1).text_encoder, own(whole).text_encoder
    ids = torch.tensor([[52, 3, 4, 53] + [53] * 73])
    expected = theirs(ids, output_hidden_states=True)
    found = mine(ids, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == 2
    assert torch.allclose(found.hidden_states[-2], expected.hidden_states[-2], atol=1e-5)
    assert torch.allclose(found[0], expected[0], atol=1e-5) and "hidden_states" not in mine(ids)
    with pytest.raises(InputError, match="hides tokens"):
        mine(ids, attention_mask=torch.zeros_like(ids))


def test_the_command_line_draws_a_prompt(whole: Whole, tmp_path: Path, cli: Cli) -> None:
    image = tmp_path / "image.png"
    arguments = ("sample", whole.floating.path, "--prompt", CALL["prompt"], "--seed", 3, "--threads", 1, "-o", image)
    summary = json.loads(cli(*arguments, "--json", "--preview", tmp_path / "preview.png").out)
    assert (tmp_path / "preview.png").read_bytes() == image.read_bytes()  # the last step's latents are the image's
    assert (summary["steps"], summary["guidance"], summary["size"]) == (STEPS, 3.0, "8x8")
    pixels = np.asarray(Image.open(image), np.float32)
    assert np.abs(pixels - np.rint(drawn(own(whole), "np")[0] * 255)).max() <= 1
    assert "these numbers of steps work" in cli(*arguments, "--steps", 4).err
    assert cli(*arguments, "--eta", 0.5).code == 2
    assert "--components float" in cli("sample", whole.floating.bundle.path, *arguments[2:]).err


def test_the_slot_is_a_bundle_and_commands_find_it(whole: Whole, tmp_path: Path) -> None:
    slot = whole.floating.path / "unet"
    assert (slot / "model.onnx").is_file() and (slot / "config.json").is_file()
    bundles = [open_bundle(folder) for folder in (slot, whole.floating.path, whole.floating.bundle.path)]
    assert {bundle.path for bundle in bundles} == {slot}
    moved = open_bundle(shutil.copytree(slot, tmp_path / "alone"))
    x = np.zeros((2, 4, 8, 8), np.float32)
    prompt = {"encoder_hidden_states": np.zeros((2, 77, 32), np.float32)}
    t = moved.deployment.calls[0]
    assert np.array_equal(moved.denoiser(1)(x, t, **prompt), bundles[0].denoiser(1)(x, t, **prompt))
    assert 0 < moved.model_bytes == (slot / "model.onnx").stat().st_size
    assert "`model.onnx` is an ordinary ONNX file" in (slot / "README.md").read_text("utf-8")


def test_no_file_names_a_place_of_this_machine(whole: Whole) -> None:
    for folder in (whole.floating.path, whole.quantized.path):
        for file in folder.rglob("*"):
            if file.is_file():
                assert str(whole.source.parent).encode() not in file.read_bytes(), file


def test_changed_and_missing_files_are_refused(whole: Whole, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole.floating.path, tmp_path / "copy"))
    assert open_pipeline(copy).manifest.digest == whole.floating.manifest.digest
    assert foreign_part(copy) is None
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    assert "notes.txt" in (foreign_part(copy) or "")
    config = copy / "vae_decoder" / "config.json"
    config.write_text(config.read_text("utf-8") + " ", encoding="utf-8")
    with pytest.raises(BundleError, match="changed"):
        load(copy)
    with pytest.raises(BundleError, match="bundle of a denoiser"):
        load(copy / "unet")
    (copy / "mezzotint.json").write_text('{"pipeline_format": 1, "denoiser": "../../other"}', encoding="utf-8")
    with pytest.raises(BundleError, match="names no denoiser"):
        open_bundle(copy)


def edited(whole: Whole, folder: Path, **changes: Any) -> Path:
    """A copy of the source with another index; None removes a part."""
    copy = Path(shutil.copytree(whole.source, folder))
    index = json.loads((copy / "model_index.json").read_text("utf-8"))
    (copy / "model_index.json").write_text(json.dumps({**index, **changes}), encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vae": ["diffusers", "VQModel"]}, "vae is a VQModel"),
        ({"text_encoder": ["os", "CLIPTextModel"]}, r"text_encoder is a os\.CLIPTextModel"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet is a ControlNetModel"),
        ({"tokenizer": ["transformers", "AutoModel"]}, "tokenizer is a AutoModel"),
        ({"vae": [None, None]}, "has no VAE"),
        ({"unet": [None, None]}, "neither unet nor transformer"),
        ({"_class_name": ["pipeline", "Mine"]}, "names no class"),
        ({"_class_name": "UNet2DModel"}, "no pipeline called"),
        ({"_class_name": "DDPMPipeline"}, "takes no prompt"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(
    whole: Whole, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        compile_pipeline(edited(whole, tmp_path / "source", **changes), tmp_path / "out", options("float"))
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_failure_leaves_no_half_pipeline(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = edited(whole, tmp_path / "source")
    (source / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="cannot load the AutoencoderKL"):
        compile_pipeline(source, tmp_path / "out", options("float"))
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
    with pytest.raises(OutputError, match="exists already"):
        compile_pipeline(whole.source, whole.floating.path, options("float"))


def test_which_folders_are_whole_pipelines(whole: Whole, tmp_path: Path) -> None:
    assert is_whole_pipeline(whole.source) and is_whole_pipeline(str(whole.source))
    assert not is_whole_pipeline(whole.source / "unet") and not is_whole_pipeline("digits")
    found = pipeline_source(edited(whole, tmp_path / "source", safety_checker=["stable_diffusion", "Checker"]))
    assert set(found.left_out) == {"safety_checker"} and found.copied == ("tokenizer",)


def test_a_scheduler_that_diffusers_writes_with_an_infinite_bound(tmp_path: Path) -> None:
    """PixArt's and Sana's pipelines come with one; JSON has no infinity."""
    diffusers.DPMSolverMultistepScheduler().save_pretrained(tmp_path / "scheduler")
    assert "-Infinity" in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    assert sampler_for(scheduler_config(tmp_path)) == "dpmpp-2m"


def test_the_page_of_models_has_what_whole_pipelines_showed() -> None:
    kept = json.loads(WHOLE_RESULTS.read_text(encoding="utf-8"))
    assert set(kept) == set(WHOLES)
    for name, found in kept.items():
        assert max(found["latents"], found["pictures"]) <= EXACT, name
        assert found["int8_db"] > LEAST_DB and found["components_db"] > LEAST_DB, name
        assert found["integer"] > found["float"] and found["sample"], name


def test_a_preview_scales_latents_as_their_vae_needs(tmp_path: Path) -> None:
    """Those of Qwen-Image have a mean and a deviation for each channel, and one frame."""
    seen: list[torch.Tensor] = []

    def decode(z: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        seen.append(z)
        return (torch.zeros(1, 3, 1, 4, 4),)

    config = FrozenDict(latents_mean=[1.0, 2.0], latents_std=[2.0, 3.0])
    pipe = SimpleNamespace(vae=SimpleNamespace(config=config, decode=decode))
    Preview(tmp_path / "preview.png").show(pipe, torch.ones(2, 2, 1, 4, 4), None, None)
    assert seen[0].shape == (1, 2, 1, 4, 4) and seen[0][0, :, 0, 0, 0].tolist() == [3.0, 5.0]
    with Image.open(tmp_path / "preview.png") as shown:
        assert shown.size == (4, 4)
    with pytest.raises(InputError, match="latents of 5 axes"):
        Preview(tmp_path / "preview.png").show(pipe, torch.ones(1, 2, 2, 4, 4), None, None)


def test_prompts_that_components_are_measured_on_are_not_calibrated_on(whole: Whole, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(held_out_prompts()))
    asked = replace(options("w8a8"), calibration=CalibrationOptions(samples=4, batch=4, prompts=file))
    with pytest.raises(ConditionError, match="there are no prompts"):
        compile_pipeline(whole.source, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()
