"""The training tool: finite, resumable to the byte, and its folder opens in diffusers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.schedule import Schedule
from tools.digits_batches import CLASSES, Batches, load_images
from tools.digits_trainer import Options
from tools.train_digits import ASSET, CHECKPOINT, main, train

DIT = ASSET.with_name("digits-dit")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TINY = {
    "sample_size": 16,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "dropout": 0.1,
}
OPTIONS = Options(steps=3, seed=5, batch=4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten pictures of random bytes, so that three batches of four reach into a second epoch."""
    images = np.random.default_rng(0).integers(0, 256, (10, 12, 14), dtype=np.uint8)
    np.savez(tmp_path / "mnist_train.npz", x=images, y=np.zeros(10, np.uint8))
    return tmp_path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The asset's own configuration with a few sizes made tiny."""
    folder = tmp_path / "config"
    edits: dict[str, dict[str, Any]] = {"unet/config.json": TINY, "scheduler/scheduler_config.json": {}}
    for name, edit in edits.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(json.loads((ASSET / name).read_text()) | edit))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the checkpoint."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != CHECKPOINT)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_three_steps_give_a_model_that_diffusers_opens(data: Path, config: Path, tmp_path: Path) -> None:
    losses = train(data, tmp_path / "out", OPTIONS, config_from=config, device="cpu")
    assert len(losses) == OPTIONS.steps
    assert all(math.isfinite(loss) and 0.1 < loss < 10 for loss in losses)  # an untrained network: about 1

    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    model = pipeline.unet
    assert isinstance(model, UNet2DModel) and model.dtype == torch.float32
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value.float()) for name, value in stored.items())
    with torch.no_grad():
        output = model(torch.zeros(2, 1, 16, 16), 7).sample
    assert output.shape == (2, 1, 16, 16) and bool(output.isfinite().all())


def test_training_moves_the_weights_and_lowers_the_loss(data: Path, config: Path, tmp_path: Path) -> None:
    options = Options(steps=60, seed=1, batch=4, rate=4e-3)
    losses = train(data, tmp_path / "out", options, config_from=config, device="cpu")
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])


def test_a_resumed_run_gives_the_same_bytes(data: Path, config: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "whole", OPTIONS, config_from=config, device="cpu")
    first = train(data, tmp_path / "parts", OPTIONS, config_from=config, device="cpu", stop_after=2)
    assert len(first) == 2 and not (tmp_path / "parts" / WEIGHTS).exists()
    second = train(data, tmp_path / "parts", OPTIONS, config_from=config, device="cpu")
    assert len(second) == 1
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


@pytest.mark.parametrize("moment", ["average", "exp_avg", "exp_avg_sq", "model"])
def test_a_checkpoint_changed_by_one_percent_gives_other_bytes(
    data: Path, config: Path, tmp_path: Path, moment: str
) -> None:
    """The planted error of the test above: every part of the checkpoint counts."""
    train(data, tmp_path / "whole", OPTIONS, config_from=config, device="cpu")
    train(data, tmp_path / "parts", OPTIONS, config_from=config, device="cpu", stop_after=2)
    checkpoint = tmp_path / "parts" / CHECKPOINT
    with safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata()
    tensors = {
        name: value * 1.01 if name.startswith(f"{moment}.") else value for name, value in load_file(checkpoint).items()
    }
    save_file(tensors, checkpoint, metadata)
    train(data, tmp_path / "parts", OPTIONS, config_from=config, device="cpu")
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert {name for name in whole if whole[name] != parts[name]} == {WEIGHTS}


@pytest.fixture
def transformer(tmp_path: Path) -> Path:
    """The configuration of digits-dit with a few sizes made tiny."""
    folder = tmp_path / "transformer-config"
    tiny = {"sample_size": 16, "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2}
    for name, edit in {"transformer/config.json": tiny, "scheduler/scheduler_config.json": {}}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(json.loads((DIT / name).read_text()) | edit))
    return folder


def test_a_transformer_learns_the_flow_and_is_resumed(data: Path, transformer: Path, tmp_path: Path) -> None:
    for name, parts in (("whole", (None,)), ("parts", (2, None))):
        for stop in parts:
            train(data, tmp_path / name, OPTIONS, config_from=transformer, device="cpu", stop_after=stop)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "whole", subfolder="transformer")
    tables = [value for name, value in model.state_dict().items() if name.endswith("embedding_table.weight")]
    assert [len(table) for table in tables] == [CLASSES + 1] * 2
    assert model.proj_out_2.weight.abs().max() > 0, "it began at zero"
    long = Options(steps=40, seed=1, batch=8, rate=4e-3)
    losses = train(data, tmp_path / "long", long, config_from=transformer, device="cpu")
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_a_batch_of_flow_is_between_image_and_noise(data: Path) -> None:
    images, schedule = load_images(data, 16), Schedule.load(DIT / "scheduler")
    labels = np.arange(10)
    batches = Batches(images, schedule, seed=3, batch=10, labels=labels)
    shown = []
    for step in range(40):
        noisy, timesteps, classes, velocity = batches.at(step)
        sigma = timesteps[:, None, None, None] / 1000
        clean = ((noisy - sigma * velocity + 1) * 127.5).round().to(torch.uint8)[:, 0].numpy()
        chosen = [int(np.flatnonzero((images == image).all((1, 2)))[0]) for image in clean]
        assert sorted(chosen) == list(range(10)) and 0 < float(sigma.min()) < float(sigma.max()) < 1
        wrong = classes.numpy() != labels[chosen]
        assert (classes.numpy()[wrong] == CLASSES).all()
        shown.append(wrong.mean())
    assert 0.05 < np.mean(shown) < 0.15
    with pytest.raises(InputError, match="of noise or of flow, not 'v_prediction'"):
        Batches(images, Schedule.named("sd").predicting("v_prediction"), seed=0, batch=5)


def test_another_seed_gives_other_bytes(data: Path, config: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "a", OPTIONS, config_from=config, device="cpu")
    train(data, tmp_path / "b", Options(steps=3, seed=6, batch=4), config_from=config, device="cpu")
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert {name for name in a if a[name] != b[name]} == {WEIGHTS}


def test_an_epoch_shows_each_picture_once(data: Path) -> None:
    images = load_images(data, 16)
    images[:, 0, 0] = np.arange(10)  # a mark in the border
    schedule = Schedule.load(ASSET / "scheduler")
    batches = Batches(images, schedule, seed=0, batch=5)
    for steps in ((0, 1), (2, 3)):
        seen: list[int] = []
        for step in steps:
            noisy, timesteps, noise = batches.at(step)
            signal = torch.from_numpy(schedule.alphas_cumprod[timesteps.numpy()])
            clean = (noisy[:, 0, 0, 0] - (1 - signal).sqrt() * noise[:, 0, 0, 0]) / signal.sqrt()
            seen += ((clean + 1) * 127.5).round().int().tolist()
        assert sorted(seen) == list(range(10))


def test_pictures_are_padded_in_the_middle(data: Path) -> None:
    images = load_images(data, 16)
    with np.load(data / "mnist_train.npz") as archive:
        assert np.array_equal(images[:, 2:14, 1:15], archive["x"])
    assert images.shape == (10, 16, 16)
    assert images[:, :2].max() == images[:, 14:].max() == images[:, :, 0].max() == images[:, :, 15].max() == 0


def test_the_rate_warms_up_and_decays_to_nothing() -> None:
    options = Options(steps=1000, rate=1.0, warmup=100)
    rates = np.array([options.rate_at(step) for step in range(1001)])
    assert rates[0] == 0.01 and rates[99] == 1.0 and rates[1000] == 0.0
    assert (np.diff(rates[:100]) > 0).all() and (np.diff(rates[100:]) < 0).all()


def test_a_checkpoint_of_other_options_is_refused(data: Path, config: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "out", OPTIONS, config_from=config, device="cpu", stop_after=1)
    with pytest.raises(InputError, match="other options"):
        train(data, tmp_path / "out", Options(steps=3, seed=6, batch=4), config_from=config, device="cpu")


def test_a_broken_checkpoint_is_refused(data: Path, config: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "out", OPTIONS, config_from=config, device="cpu", stop_after=1)
    checkpoint = tmp_path / "out" / CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot read the checkpoint"):
        train(data, tmp_path / "out", OPTIONS, config_from=config, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.npz"], "cannot read the images"),
        (["--steps", "0"], "steps, batch and rate are positive"),
        (["--batch", "11"], "10 images are fewer than one batch of 11"),
        (["--device", "abacus"], "torch has no device 'abacus'"),
        (["--config", "nowhere"], "cannot read a configuration"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    data: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    usual = ["--data", str(data), "-o", str(tmp_path / "out"), "--config", str(config), "--batch", "4", "--steps", "3"]
    assert main([*usual, *arguments]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_the_asset_is_half_precision_and_finite() -> None:
    stored = load_file(ASSET / WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert sum(value.numel() for value in stored.values()) == 4_435_393
    assert all(bool(value.isfinite().all()) for value in stored.values())
