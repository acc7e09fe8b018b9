"""The embedded transformer: its name is enough, and it draws the classes that were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mezzotint.compiler.frontend.from_torch import load_model
from mezzotint.frechet import CLASSIFIER, FeatureNet
from mezzotint.io.hub import card_fields
from mezzotint.io.sources import DIGITS_DIT
from mezzotint.options import CompileOptions, DeploymentOptions
from mezzotint.prepared import prepare
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.guidance import combine, doubled
from mezzotint.runtime.sampling.samplers import initial_noise, sample
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import ClassLabels, Images, Timestep


def test_its_name_is_enough_for_a_compilation_with_guidance(tmp_path: Path) -> None:
    options = CompileOptions(deployment=DeploymentOptions(steps=20, guidance=3.0))
    prepared = prepare("digits-dit", tmp_path / "dit", options)
    assert prepared.source.name == "digits-dit" and prepared.deployment.sampler == "flow-euler"
    assert prepared.signature.labels == (ClassLabels("class_labels", 10, null=10),)
    assert prepared.conditions is not None and prepared.unconditional is not None
    assert prepared.conditions["class_labels"].tolist() == list(range(10))
    assert prepared.unconditional["class_labels"].tolist() == [10]
    assert card_fields("digits-dit")["license"] == "apache-2.0"


def test_guidance_draws_the_classes() -> None:
    """In torch, from the half-precision weights; it was 499 of 500 images of 20 steps."""
    model = load_model(DIGITS_DIT / "transformer")
    schedule, labels = Schedule.load(DIGITS_DIT), torch.arange(20) % 10
    both = torch.cat([torch.full_like(labels, 10), labels])

    def predict(x: Images, t: Timestep) -> Images:
        with torch.no_grad():
            output = model(torch.from_numpy(doubled(x)), torch.full((40,), float(t)), both).sample
        return combine(output.numpy(), 3.0)

    images = sample(predict, initial_noise(5, (20, 1, 32, 32)), schedule, Deployment.of(schedule, "flow-euler", 10))
    right = FeatureNet(CLASSIFIER).classify(np.clip(images, -1, 1)) == labels.numpy()
    assert right.mean() >= 0.9


def test_the_asset_is_half_precision_and_finite() -> None:
    stored = load_file(DIGITS_DIT / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert all(bool(value.isfinite().all()) for value in stored.values())
    config = json.loads((DIGITS_DIT / "transformer" / "config.json").read_text())
    tables = [value for name, value in stored.items() if name.endswith("embedding_table.weight")]
    assert len(tables) == config["num_layers"] and {len(table) for table in tables} == {11}
