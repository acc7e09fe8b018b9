"""The options of functions and of commands: named, typed, and the same in both."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mezzotint
from mezzotint import Bundle, compile_model, export_model, mix_bundles, sample, sample_to_folder
from mezzotint.cli import app, export, mix
from mezzotint.cli import sample as sample_command
from mezzotint.cli.options import SAMPLER_NAMES
from mezzotint.compiler.errors import RecipeError
from mezzotint.evaluate.run import evaluate_bundle
from mezzotint.options import RECIPE, CompileOptions, DeploymentOptions, RecipeOptions
from mezzotint.passes.recipes.catalog import DEFAULT
from mezzotint.passes.recipes.targets import default_recipe
from mezzotint.runtime.sampling.deployment import SAMPLERS, UNGUIDED
from mezzotint.runtime.sampling.options import SamplingOptions
from mezzotint.runtime.targets import TARGETS
from mezzotint.shards.shards import ShardOptions

ROOT = Path(__file__).parents[2]
# The command's name of an option -> that of the function, where they differ.
RENAMED = {
    "lora": "loras",
    "set_": "settings",
    "input_": "inputs",
    "output": "output_name",
    "bundle": "output",
    "format_": "format",
}
DISPLAY = {"json", "quiet", "dry_run"}  # of commands only


def names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def command_names(function: Callable[..., Any], renamed: dict[str, str]) -> set[str]:
    return {renamed.get(name, name) for name in names(function)} - DISPLAY


def open_ended(function: Callable[..., Any]) -> list[str]:
    """The parameters of a function that take any further keyword or any further position."""
    some = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind in some]


@pytest.mark.parametrize("name", sorted(mezzotint.__all__))
def test_public_functions_name_every_option(name: str) -> None:
    value = getattr(mezzotint, name)
    functions = [value] if inspect.isfunction(value) else []
    if inspect.isclass(value):
        functions = [f for key, f in vars(value).items() if inspect.isfunction(f) and not key.startswith("_")]
    assert {f.__qualname__: open_ended(f) for f in functions if open_ended(f)} == {}


def test_the_probe_sees_open_ended_options() -> None:
    def planted(n: int, **options: Any) -> None: ...

    assert open_ended(planted) == ["options"]


def test_compile_has_the_options_of_the_function() -> None:
    whole = {"components", "control_images"}  # of a pipeline, which compile_pipeline takes
    objects = {"progress", "condition_network"}  # what no command line can say
    assert command_names(app.compile_, RENAMED) - whole == names(compile_model) - objects


def test_export_has_the_options_of_the_function() -> None:
    """Those about the model are also options of compile, with the same names."""
    assert command_names(export.export, {"input_": "inputs", "lora": "loras"}) == names(export_model) - {"progress"}
    assert names(export_model) - names(compile_model) == set()


def test_sample_has_the_options_of_the_functions() -> None:
    command = command_names(sample_command.sample, {"format_": "format", "output": "folder"})
    command -= {"prompt", "negative", "preview"}  # of a compiled pipeline, which mezzotint.diffusers.load opens
    command -= {"control_image", "control_scale"}  # of one with a ControlNet
    command -= {"dry_run"}  # which draws nothing

    engine = {"provider", "provider_option", "precision"}  # a value in Python, which a bundle is put on

    assert command - engine == names(sample_to_folder) - {"progress"}
    of_folders = {"folder", "shard_size", "format", "shards", "force", "cluster"}
    assert command - engine - of_folders == names(sample) - {"first", "progress", "engine"}
    assert names(sample) - {"bundle", "engine"} == names(Bundle.sample) - {"self"}


def test_mix_has_the_options_of_the_function() -> None:
    assert command_names(mix.mix, {"cost": "costs"}) == names(mix_bundles) - {"repeats", "progress"}


def fields(value: type) -> set[str]:
    return {field.name for field in dataclasses.fields(value)}


def test_the_values_have_every_option() -> None:
    plain = CompileOptions()
    groups = [type(getattr(plain, field.name)) for field in dataclasses.fields(plain)]
    of_groups = set().union(*(fields(group) for group in groups))
    calibration = {"calibration_samples": "samples", "calibration_batch": "batch"}
    others = {"model", "output", "threads", "device", "progress"}
    assert of_groups == {calibration.get(name, name) for name in names(compile_model) - others}
    assert fields(SamplingOptions) == names(Bundle.sample) - {"self", "n", "first", "threads", "progress"}
    others = {"bundle", "folder", "n", "threads", "cluster", "progress"}
    assert fields(SamplingOptions) | fields(ShardOptions) == names(sample_to_folder) - others


def test_defaults_that_are_written_twice() -> None:
    assert RECIPE == DEFAULT == RecipeOptions().chosen().name
    for name in TARGETS:
        chosen = RecipeOptions(target=name).chosen()
        assert (chosen.name, chosen.target) == (default_recipe(name), name)
    assert RecipeOptions("w8a8-constant").chosen().target == "portable"
    with pytest.raises(RecipeError, match="no target called 'openvin'") as caught:
        RecipeOptions(target="openvin")
    assert caught.value.hint == "choose one of onnxruntime, openvino, tensorrt, portable"
    assert DeploymentOptions().guidance == UNGUIDED
    assert SAMPLER_NAMES.split(", ") == list(SAMPLERS)
    command, function = defaults(app.compile_), defaults(compile_model)
    same = ("recipe", "steps", "eta", "guidance", "calibration_samples", "calibration_batch", "seed")
    assert [command[name] for name in same] == [function[name] for name in same]
    plain = CompileOptions()
    groups = (plain.recipe, plain.deployment, plain.calibration)
    attributes = ("recipe", "steps", "eta", "guidance", "samples", "batch", "seed")
    found = [next(getattr(group, name) for group in groups if hasattr(group, name)) for name in attributes]
    assert found == [function[name] for name in same]


def test_options_load_nothing_heavy() -> None:
    code = "import mezzotint.options, mezzotint.progress, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert "mezzotint.options" in done.stdout.split()
    assert {"numpy", "torch", "onnx_ir", "rich"} & set(done.stdout.split()) == set()


def test_the_logger_of_the_package_is_quiet_until_configured() -> None:
    handlers = logging.getLogger("mezzotint").handlers

    assert any(isinstance(handler, logging.NullHandler) for handler in handlers)


def test_evaluation_names_every_option() -> None:
    assert open_ended(evaluate_bundle) == []


def test_every_command_that_shows_progress_can_be_quiet() -> None:
    commands = [command.callback for command in app.app.registered_commands if command.callback is not None]
    showing = [command for command in commands if "shown(" in inspect.getsource(command)]

    assert len(showing) == 9
    assert [command.__name__ for command in showing if "quiet" not in names(command)] == []
