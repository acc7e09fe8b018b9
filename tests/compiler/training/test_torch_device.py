"""Training on a device: one that is not there is refused early, and on one that is there nothing stays behind.

No test runs on CUDA. The second device of tests/helpers/second_device.py computes on the CPU, so all must be equal.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint import compile_model
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.cache import Cache
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.torch_graph.operations_elementwise import Where
from mezzotint.compiler.torch_graph.operations_shapes import Gather
from mezzotint.compiler.training import torch_device
from mezzotint.compiler.training.unit_cache import training_key
from mezzotint.passes.distill import Distill
from mezzotint.passes.learn_scales import LearnScales
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.passes.reconstruct import Reconstruct
from mezzotint.runtime.errors import InputError, MezzotintError
from tests.helpers.models import Cli, hand_written, write
from tests.helpers.second_device import SECOND, SecondDevice
from tests.helpers.tiny import context_in, tiny_program

BLOCK = ("b1_conv1*",)
UNIT: dict[str, Any] = {"iterations": 2, "calls": 2, "samples": 2, "held_out": 0}
WHOLE: dict[str, Any] = {"iterations": 2, "samples": 2, "held_out": 2, "checks": 1, "weight_steps": 2e-2}
LONGER = {
    "iterations": 40,
    "samples": 8,
    "held_out": 8,
    "weight_steps": 5e-3,
    "float_shares": 5e-3,
    "scale_shares": 5e-3,
}
PASSES = [
    Reconstruct(**UNIT, units=BLOCK, inner=1.0),
    LearnScales(**UNIT, units=BLOCK, what="both"),
    LearnScales(**UNIT, through="network", form="network"),
    Distill(**WHOLE, unroll=2, scales="activations"),
    Distill(**WHOLE, unroll=1, weights="adapters", blocks=1.0, relations=1.0),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The tiny denoiser with weights of 3 bits, and tables for its steps."""
    options = {"choose_scales.weight_bits": 3, "choose_scales.weights": "minmax"}
    steps = with_options(RECIPES["w8a8-steps"], options).passes
    return pipeline.run_passes(tiny_program(steps=3), steps, context_in(tmp_path_factory.mktemp("program")))


def trained(program: Program, step: Pass, context: Context, **changes: Any) -> Program:
    return pipeline.run_passes(program, [step], replace(context, threads=1, **changes))


def assert_equal(one: Program, two: Program) -> None:
    assert one.training == two.training and any(unit.losses for unit in one.training)
    old, new = constants(one), constants(two)
    assert old.keys() == new.keys()
    for name, array in old.items():
        np.testing.assert_array_equal(new[name], array, err_msg=name)


def constants(program: Program) -> dict[str, np.ndarray]:
    return {name: numpy_of(value) for name, value in program.graph.initializers.items()}


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_a_pass_trains_on_a_second_device_alone(
    step: Pass, program: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes are the bytes of the CPU."""
    here = trained(program, step, context)
    monkeypatch.setattr(torch_device, "find_device", torch.device)
    with SecondDevice() as second:
        there = trained(program, step, context, device=SECOND.type)
    assert second.computed > 1000
    assert_equal(here, there)


def test_a_fit_goes_on_on_the_second_device(
    program: Program, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_device, "find_device", torch.device)
    step = Distill(**{**WHOLE, "checks": 2}, unroll=1)
    with SecondDevice():
        whole, again = (
            trained(program, step, context, device=SECOND.type, cache=Cache(_without_last(tmp_path))) for _ in range(2)
        )
    assert_equal(whole, again)


def _without_last(cache: Path) -> Path:
    """Return the cache, without the entry of the last check if it has one."""
    for entry in cache.glob("check-*-2"):
        shutil.rmtree(entry)
    return cache


def test_the_second_device_finds_what_was_left_behind() -> None:
    with SecondDevice():
        away = torch.ones(2, device=SECOND)
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            away + torch.ones(2)
        with pytest.raises(RuntimeError):
            away.numpy()


def test_what_data_chooses_of_a_constant_is_where_the_data_is() -> None:
    with SecondDevice():
        for chosen in (
            Where(torch.tensor([True, False], device=SECOND), torch.tensor([5, 6]), 7),
            Gather((7, 6, 5), torch.tensor([2, 0], device=SECOND)),
        ):
            assert chosen.device == SECOND and chosen.tolist() == [5, 7]


@pytest.mark.parametrize(
    "step",
    [
        Reconstruct(**{**UNIT, "iterations": 100}, units=BLOCK, precision="bfloat16"),
        LearnScales(**{**UNIT, "iterations": 30}, units=BLOCK, what="both", precision="bfloat16"),
        Distill(**{**WHOLE, **LONGER}, unroll=1, precision="bfloat16"),
    ],
    ids=lambda step: step.name,
)
def test_forward_passes_of_bfloat16_train_too(step: Any, program: Program, context: Context) -> None:
    """Losses are others than in float32; the error of the start is measured in float32 and equal."""
    (short,) = trained(program, step, context).training
    (exact,) = trained(program, replace(step, precision="float32", iterations=1), context).training
    assert short.start == exact.start and short.losses[0] != exact.losses[0]
    assert short.hard < 0.97 * short.start


def test_another_device_has_other_entries_of_the_cache(program: Program, context: Context) -> None:
    keys = [training_key(program, replace(context, device=device), 1, {}) for device in ("cpu", "cuda", "cuda:1")]
    assert len(set(keys)) == 3 and keys[0] == training_key(program, context, 1, {})


@pytest.mark.parametrize(
    ("recipe", "device", "kind", "words"),
    [
        ("brecq", "cuda", InputError, "the device 'cuda' is not there: torch"),
        ("w4a8-best", "cuda:1", InputError, "the device 'cuda:1' is not there: torch"),
        ("w8a8", "cuda", RecipeError, "the device is 'cuda', and no pass of the recipe trains"),
        ("brecq", "gpu", InputError, "the device is 'gpu'"),
        ("w8a8", "cpu:0", InputError, "the device is 'cpu:0'"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused_before_the_model_is_read(
    recipe: str, device: str, kind: type[MezzotintError], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = write(hand_written(), tmp_path / "m.onnx")
    begun: list[str] = []
    options: dict[str, Any] = {"recipe": recipe, "scheduler": "ddpm-linear", "device": device}
    with pytest.raises(kind, match=words) as refused:
        compile_model(source, tmp_path / "b", **options, progress=lambda stage, *_: begun.append(stage))
    assert refused.value.hint and not begun and not (tmp_path / "b").exists()


def test_the_command_refuses_a_device_in_a_dry_run_too(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["compile", write(hand_written(), tmp_path / "m.onnx"), "-o", tmp_path / "b", "--recipe", "brecq"]
    command += ["--scheduler", "ddpm-linear"]
    for more in ([], ["--dry-run"]):
        said = cli(*command, "--device", "cuda", *more)
        assert said.code == 2 and "the device 'cuda' is not there" in said.err
    assert cli(*command, "--device", "cpu", "--dry-run").code == 0


def test_a_number_beyond_the_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert torch_device.find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="torch finds 2, counted from cuda:0") as refused:
        torch_device.find_device("cuda:2")
    assert refused.value.hint == "choose one of cuda:0 to cuda:1"


def test_settings_of_torch_are_as_before_a_training(context: Context) -> None:
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    with torch_device.training_device(replace(context, threads=before[0] + 1)) as device:
        assert device == torch.device("cpu") and torch.get_num_threads() == before[0] + 1
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == before
