"""The forms of a MODEL argument, and the scheduler of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mezzotint.compiler.errors import ModelError
from mezzotint.io.sources import DIGITS, FolderSource, ModuleSource, OnnxSource, resolve
from mezzotint.runtime.errors import ScheduleError
from mezzotint.runtime.sampling.schedule import Schedule

CONFIG = {"beta_schedule": "linear", "num_train_timesteps": 1000}


def scheduler(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({**CONFIG, **changes}))
    return path


def test_digits_are_in_the_package() -> None:
    source = resolve("digits")

    assert isinstance(source, FolderSource)
    assert (source.kind, source.name, source.path) == ("diffusers", "digits", DIGITS / "unet")
    assert source.schedule.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("model", "schedule"), [("unet", "scheduler"), (".", "."), (".", "scheduler"), ("unet", "unet")]
)
def test_a_diffusers_folder(tmp_path: Path, model: str, schedule: str) -> None:
    (tmp_path / model).mkdir(exist_ok=True)
    (tmp_path / model / "config.json").write_text("{}")
    scheduler(tmp_path / schedule, num_train_timesteps=77)

    source = resolve(tmp_path)

    assert isinstance(source, FolderSource)
    assert source.path == tmp_path / model
    assert source.schedule.num_train_timesteps == 77


def test_a_folder_with_an_onnx_model(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.onnx").write_bytes(b"")
    scheduler(tmp_path / "scheduler")

    source = resolve(tmp_path)

    assert isinstance(source, OnnxSource)
    assert (source.kind, source.path) == ("onnx", tmp_path / "unet" / "model.onnx")


def test_the_transformer_of_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    scheduler(tmp_path / "scheduler")

    source = resolve(tmp_path)

    assert isinstance(source, FolderSource)
    assert source.path == tmp_path / "transformer"


def test_a_configuration_beside_an_onnx_model_belongs_to_it(tmp_path: Path) -> None:
    scheduler(tmp_path)
    model, config = tmp_path / "model.onnx", tmp_path / "config.json"
    model.write_bytes(b"")
    config.write_text('{"_class_name": "UNet2DModel", "sample_size": 8}')

    for path in (tmp_path, model):
        source = resolve(path)
        assert isinstance(source, OnnxSource)
        assert source.path == model
        assert source.config == {"_class_name": "UNet2DModel", "sample_size": 8}
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert isinstance(resolve(tmp_path), FolderSource), "there are weights"


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "[]", '{"_class_name": 3}'])
def test_the_configuration_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    scheduler(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "config.json").write_text(content)

    source = resolve(tmp_path / "model.onnx")

    assert isinstance(source, OnnxSource)
    assert source.config is None


def test_a_broken_configuration_beside_an_onnx_model(tmp_path: Path) -> None:
    scheduler(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "config.json").write_text("{")

    with pytest.raises(ModelError, match="not readable JSON") as caught:
        resolve(tmp_path)
    assert caught.value.where == str(tmp_path / "config.json")
    assert caught.value.hint


@pytest.mark.parametrize("part", [".", "unet"])
def test_a_bundle_is_no_source(tmp_path: Path, part: str) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "unet" / "model.onnx").write_bytes(b"")
    (tmp_path / "mezzotint.json").write_text("{}")

    with pytest.raises(ModelError, match="this is a bundle: it is compiled already") as caught:
        resolve(tmp_path / part)
    assert caught.value.where == str(tmp_path)
    assert caught.value.hint


def test_an_onnx_file_with_a_scheduler_beside_it(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    scheduler(tmp_path, num_train_timesteps=77)

    assert resolve(tmp_path / "m.onnx").schedule.num_train_timesteps == 77


def test_a_scheduler_can_be_named_or_given(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"")
    own = scheduler(tmp_path / "other", num_train_timesteps=77)
    made = Schedule.from_config(CONFIG)

    assert resolve(model, "sd").schedule == Schedule.named("sd")
    assert resolve(model, own).schedule.num_train_timesteps == 77
    assert resolve(model, own.parent).schedule.num_train_timesteps == 77
    assert resolve(model, made).schedule is made


def test_another_scheduler_of_the_same_length_is_accepted() -> None:
    assert resolve("digits", "cosine").schedule == Schedule.named("cosine")


def test_a_module_in_memory_needs_a_scheduler() -> None:
    import torch

    module = torch.nn.Linear(1, 1)

    source = resolve(module, "sd")

    assert isinstance(source, ModuleSource)
    assert (source.kind, source.name, source.module) == ("module", "Linear", module)
    with pytest.raises(ScheduleError, match="without a scheduler") as caught:
        resolve(module)
    assert "--scheduler" in (caught.value.hint or "")


@pytest.mark.parametrize("path", ["nowhere", "nowhere/m.onnx"])
def test_a_path_that_does_not_exist(tmp_path: Path, path: str) -> None:
    with pytest.raises(ModelError, match="no such model") as caught:
        resolve(tmp_path / path)

    assert caught.value.where == str(tmp_path / path)
    assert caught.value.hint


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a diffusers model"):
        resolve(tmp_path)


@pytest.mark.parametrize("requested", ["nothing", "ddpm-liner"])
def test_an_unknown_scheduler(requested: str) -> None:
    with pytest.raises(ScheduleError, match="no scheduler configuration") as caught:
        resolve("digits", requested)

    assert caught.value.where == requested


def test_a_scheduler_of_another_length(tmp_path: Path) -> None:
    requested = scheduler(tmp_path, num_train_timesteps=500)

    with pytest.raises(ScheduleError, match="500 timesteps, the model was trained with 1000") as caught:
        resolve("digits", requested)

    assert caught.value.where == str(requested)
    assert caught.value.hint
