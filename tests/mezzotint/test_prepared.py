"""What needs no run of the model is refused by --dry-run and by compile, with one error, before torch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from mezzotint import compile_model
from mezzotint.dry_run import plan_compile
from mezzotint.options import CalibrationOptions, CompileOptions, DeploymentOptions, ImportRoles, RecipeOptions
from mezzotint.runtime.errors import MezzotintError
from tests.helpers.models import CONTEXT, hand_written, write

ROWS = np.zeros((3, CONTEXT), np.float32)
REFINER = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [32, 32],
    "cross_attention_dim": 16,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}


def onnx_file(folder: Path, **options: Any) -> Path:
    return write(hand_written(**options), folder / "m.onnx")


@pytest.mark.parametrize(
    ("model", "options", "complaint"),
    [
        ({"context": "context"}, {}, "condition 'context'"),
        ({"context": "context"}, {"conditions": {"context": ROWS[:, :-1]}}, "has the shape"),
        ({"context": "context"}, {"conditions": {"context": ROWS.astype(np.float64)}}, "float64"),
        ({"context": "context"}, {"conditions": {"context": ROWS * np.float32("nan")}}, "NaN or infinite"),
        ({"context": "context"}, {"conditions": {"context": ROWS}, "guidance": 2.0}, "unconditional rows"),
        ({}, {"conditions": {"other": ROWS}}, "no condition 'other'"),
        ({}, {"guidance": 2.0}, "models with a condition"),
        ({}, {"sampler": "heun", "steps": 6}, "calls timestep"),
        ({}, {"sampler": "flow-euler"}, "flow matching"),
        ({}, {"timestep_unit": "fraction"}, "floating type"),
        ({}, {"channels": 3}, "takes 1 channels"),
        ({}, {"prediction": "flow_prediction"}, "flow_prediction"),
        ({}, {"size": (16, 16)}, "drop --size|8x8"),
        ({}, {"inputs": {"sample": "z"}}, "no input is called 'z'"),
        ({}, {"settings": {"insert_qdq.lowering": "qdq"}}, "integer or the constant lowering"),
        ({}, {"target": "openvino"}, "no form for the target openvino(.|\n)*--recipe w8a8-constant, w8a8"),
        ({}, {"recipe": "w8a8-constant", "target": "onnxruntime"}, "no form for the target onnxruntime"),
        ({}, {"settings": {"observe.channels": "none"}}, "no channel was measured"),
        ({}, {"recipe": "w4a8", "settings": {"assign_bits.mean_bits": None}}, "has no budget"),
        ({"time_dtype": TensorProto.FLOAT}, {"scheduler": "cosine:3"}, "steps are not possible"),
    ],
)
def test_both_refuse_alike(tmp_path: Path, model: dict[str, Any], options: dict[str, Any], complaint: str) -> None:
    given = {"scheduler": "ddpm-linear", "steps": 4, "recipe": "w8a8-steps", **options}
    source, target = onnx_file(tmp_path, **model), tmp_path / "b"
    whole = CompileOptions(
        RecipeOptions(given["recipe"], given.get("settings", {}), given.get("target")),
        DeploymentOptions(given.get("sampler"), given["steps"], 0.0, given.get("guidance", 1.0), given["scheduler"]),
        CalibrationOptions(conditions=given.get("conditions")),
        ImportRoles(
            given.get("inputs", {}),
            None,
            given.get("prediction"),
            given.get("size"),
            given.get("timestep_unit"),
            given.get("channels"),
        ),
    )
    with pytest.raises(MezzotintError, match=complaint) as dry:
        plan_compile(str(source), target, whole)
    with pytest.raises(MezzotintError) as real:
        compile_model(source, target, **given)
    assert str(dry.value) == str(real.value)
    assert not target.exists()


@pytest.mark.parametrize(
    ("index", "wide", "shapes"),
    [
        ({"requires_aesthetics_score": True}, 40, {"text_embeds": (40,), "time_ids": (5,)}),
        ({}, 32, {"text_embeds": (32,), "time_ids": (6,)}),
        (None, 40, {"text_embeds": (40,), "time_ids": (5,)}),  # by the conditions themselves
    ],
    ids=["refiner", "base", "by rows"],
)
def test_a_folder_is_checked_without_torch(
    tmp_path: Path, index: dict[str, Any] | None, wide: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    unet = tmp_path / "pipe" / "unet"
    (tmp_path / "pipe" / "scheduler").mkdir(parents=True)
    unet.mkdir()
    (unet / "config.json").write_text(json.dumps({**REFINER, "time_cond_proj_dim": 24}), encoding="utf-8")
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER), encoding="utf-8")
    if index is not None:
        (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    rows = {"encoder_hidden_states": (12, 16), "timestep_cond": (24,), **shapes}
    arrays: dict[str, Any] = {name: np.ones((2, *shape), np.float32) for name, shape in rows.items()}
    np.savez(tmp_path / "c.npz", **arrays)
    program = (
        "import sys; from pathlib import Path; from mezzotint.dry_run import plan_compile\n"
        "from mezzotint.options import *\n"
        f"o = CompileOptions(calibration=CalibrationOptions(conditions={str(tmp_path / 'c.npz')!r}))\n"
        f"plan = plan_compile({str(tmp_path / 'pipe')!r}, Path({str(tmp_path / 'b')!r}), o)\n"
        "print(*plan['signature']['conditions'], 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout.split() == [*("encoder_hidden_states", "timestep_cond", "text_embeds", "time_ids", "False")], (
        run.stderr
    )
