"""The embedded transformer, from its name to images of the classes that were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors.torch import load_file

from mezzotint import compile_model
from mezzotint.frechet import CLASSIFIER, FeatureNet
from mezzotint.io.sources import DIGITS_DIT
from mezzotint.runtime.signature import ClassLabels


def test_its_name_is_enough_and_guidance_draws_the_classes(tmp_path: Path) -> None:
    exported = tmp_path / "float.onnx"
    bundle = compile_model(
        "digits-dit", tmp_path / "dit", guidance=3.0, steps=10, recipe="w8a8", calibration_samples=4, export=exported
    )
    assert bundle.signature.labels == (ClassLabels("class_labels", 10, 10),)
    timestep = next(value for value in onnx.load(exported).graph.input if value.name == bundle.signature.timestep)
    assert timestep.type.tensor_type.elem_type == onnx.TensorProto.FLOAT, "ten steps are whole, twenty are not"
    assert bundle.manifest.kernels.integer > 8 * bundle.manifest.kernels.floating

    found = FeatureNet(CLASSIFIER).classify(np.clip(bundle.sample(20), -1, 1))
    assert (found == np.arange(20) % 10).mean() >= 0.8
    sevens = FeatureNet(CLASSIFIER).classify(bundle.sample(4, conditions={"class_labels": np.array([7])}))
    assert (sevens == 7).mean() >= 0.75


def test_the_asset_is_half_precision_and_finite() -> None:
    stored = load_file(DIGITS_DIT / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert all(bool(value.isfinite().all()) for value in stored.values())
    config = json.loads((DIGITS_DIT / "transformer" / "config.json").read_text())
    tables = [value for name, value in stored.items() if name.endswith("embedding_table.weight")]
    assert len(tables) == config["num_layers"] and {len(table) for table in tables} == {11}
