"""A small network with class labels, written by hand with the configuration that says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx

from tests.helpers.models import CONTEXT, hand_written

CLASSES = 3
CONFIG = {"_class_name": "DiTTransformer2DModel", "num_embeds_ada_norm": CLASSES, "in_channels": 1, "sample_size": 8}


def labelled(folder: Path) -> Path:
    """Write a network with the condition `class_labels`, 0 to 2 and 3 for no class, and its configuration."""
    model = hand_written(context="embedded")
    del model.graph.input[[value.name for value in model.graph.input].index("embedded")]
    model.graph.input.append(onnx.helper.make_tensor_value_info("class_labels", onnx.TensorProto.INT64, ["batch"]))
    table = 3 * np.random.default_rng(5).standard_normal((CLASSES + 1, CONTEXT)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "classes"))
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["classes", "class_labels"], ["embedded"]))
    onnx.save(model, folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder / "model.onnx"
