"""From the command line and Python to the bundle: LoRAs, variants, checkpoints, pickles, ids of the hub."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mezzotint import Bundle, compile_model, open_bundle
from mezzotint.compiler.errors import ModelError
from mezzotint.io.checkpoints import config_folder, missing_model
from mezzotint.io.sources import FolderSource, resolve
from mezzotint.model_weights import parse_loras
from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.runtime.bundle.manifest import Manifest
from mezzotint.runtime.errors import BundleError
from mezzotint.runtime.sampling.schedule import NAMED_SCHEDULES
from tests.helpers.models import SMALL, Cli
from tools.tiny_models import TINY

NAME = "DiTTransformer2DModel"
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, 16), (16, 2)))
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file({f"transformer.{LAYER}.lora_A.weight": down, f"transformer.{LAYER}.lora_B.weight": up}, file)
    return file


@pytest.fixture(scope="module")
def fused(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Any]:
    """Return a bundle of a network in bfloat16 with the LoRA twice, and the network."""
    module: Any = TINY[NAME].build().to(torch.bfloat16)
    options = {**SMALL, "threads": 1, "acceptance_seconds": 1, "conditions": TINY[NAME].conditions(2)}
    target = tmp_path_factory.mktemp("fused") / "bundle"
    return compile_model(module, target, recipe="float", loras=[(lora, 0.5), lora], **options), module


def test_the_bundle_computes_with_the_loras(fused: tuple[Bundle, Any], lora: Path) -> None:
    from safetensors.torch import load_file

    bundle, module = fused
    assert module.proj_out_2.weight.dtype == torch.bfloat16, "the caller's module is as it was"
    wide = module.float()
    down, up = load_file(lora).values()
    x = np.random.default_rng(2).standard_normal((2, 4, 8, 8)).astype(np.float32)
    conditions = TINY[NAME].conditions(2)
    tensors = {name: torch.from_numpy(array) for name, array in conditions.items()}
    found = bundle.denoiser(threads=1)(x, 500, **conditions)

    def with_weight(weight: float) -> float:
        layer = wide.get_submodule(LAYER)
        hook = layer.register_forward_hook(lambda _, given, out: out + weight * given[0] @ down.T @ up.T)
        with torch.no_grad():
            both = wide(torch.from_numpy(x), timestep=torch.full((2,), 500), **tensors, return_dict=False)[0]
        hook.remove()
        wanted = both[:, :4].numpy()
        return float(np.abs(found - wanted).max() / np.abs(wanted).max())

    assert with_weight(1.5) < 1e-5 < 1e-3 < with_weight(1.0)


def test_hash_and_weight_are_shown(fused: tuple[Bundle, Any], lora: Path, cli: Cli) -> None:
    bundle, _ = fused
    entries = open_bundle(bundle.path).manifest.source.loras
    assert [(entry.name, entry.weight, entry.layers) for entry in entries] == [
        ("style.safetensors", 0.5, 1),
        ("style.safetensors", 1.0, 1),
    ]
    assert {entry.sha256 for entry in entries} == {file_sha256(lora)}
    line = f"style.safetensors with weight 0.5 in 1 layers (SHA-256 {file_sha256(lora)[:12]})"
    assert line in (bundle.path / "README.md").read_text(encoding="utf-8")
    assert "weight 0.5 in 1 layers" in cli("inspect", bundle.path).out
    data = bundle.manifest.to_json()
    data["source"]["loras"][0]["weight"] = math.inf
    with pytest.raises(BundleError, match="finite number"):
        Manifest.from_json(data, "planted")


def test_files_and_weights_of_the_command_line(tmp_path: Path) -> None:
    named = tmp_path / "a:0.5"
    named.write_bytes(b"")
    items = ["style.safetensors", "style.safetensors:0.8", "C:\\style.safetensors", str(named), ":0.5"]
    assert parse_loras(items) == [
        ("style.safetensors", 1.0),
        ("style.safetensors", 0.8),
        ("C:\\style.safetensors", 1.0),
        (str(named), 1.0),
        (":0.5", 1.0),
    ]


def test_what_cannot_be_fused_or_read_is_refused_before_any_work(lora: Path, tmp_path: Path, cli: Cli) -> None:
    model, pickle = tmp_path / "model.onnx", tmp_path / "model.ckpt"
    for file in (model, pickle):
        file.write_bytes(b"")
    checkpoint = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(1)}, checkpoint)
    schedule = ("--scheduler", "ddpm-linear")
    for arguments, complaint in (
        ((model, "--lora", lora), "an ONNX file takes no LoRA"),
        (("digits", "--lora", tmp_path / "none.safetensors"), "none.safetensors"),
        (("digits", "--lora", f"{lora}:nan"), "the weight of a LoRA is nan"),
        (("digits", "--variant", "fp16"), "no weights of the variant 'fp16'"),
        (("digits", "--config", tmp_path), "only a checkpoint of one file"),
        ((pickle,), "a .ckpt file is a pickle"),
        ((checkpoint,), "a checkpoint has no configuration"),
        ((checkpoint, "--config", tmp_path), "there is no config.json in"),
        (("runwayml/stable-diffusion-v1-5",), "downloads nothing"),
    ):
        answer = cli("compile", *arguments, *schedule, "-o", tmp_path / "out", "--dry-run")
        assert answer.code == 2 and complaint in " ".join(answer.err.split()), complaint
    assert not (tmp_path / "out").exists()


def test_an_id_of_the_hub_says_how_to_get_it(tmp_path: Path) -> None:
    error = missing_model(Path("runwayml/stable-diffusion-v1-5"))
    assert "hf download runwayml/stable-diffusion-v1-5 --local-dir" in str(error.hint)
    assert "no such model" in missing_model(tmp_path / "gone").what


def test_a_checkpoint_takes_the_configuration_of_a_pipeline(tmp_path: Path) -> None:
    pipeline, file = tmp_path / "pipeline", tmp_path / "weights" / "model.safetensors"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "scheduler").mkdir()
    (pipeline / "unet" / "config.json").write_text("{}")
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(NAMED_SCHEDULES["sd"]))
    file.parent.mkdir()
    save_file({"x": torch.ones(1)}, file)

    source = resolve(file, config=pipeline)

    assert isinstance(source, FolderSource)
    assert (source.path, source.checkpoint) == (pipeline / "unet", file)
    assert source.schedule.config["steps_offset"] == 1
    assert config_folder(pipeline / "x.safetensors", None) == pipeline / "unet", "next to the file"
    with pytest.raises(ModelError, match="no configuration"):
        resolve(file)
