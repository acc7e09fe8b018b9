"""Small diffusers networks in the files that both torch exporters write, and in optimum's layout, compile."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint import compile_model
from mezzotint.compiler.core.pipeline import Context, run_passes
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.frontend.torch_example import PositionalModel, quiet_exporter
from mezzotint.compiler.graph.nodes import counts, is_constant, numpy_of
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.lower_norms import LowerNorms
from mezzotint.passes.normalize import Normalize
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.session import open_session
from tests.helpers.models import SMALL, small_conditional_unet, small_unet

TINY = {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 4}
BATCH = torch.export.Dim("batch", max=63)


def export(file: Path, exporter: str, opset: int, conditional: bool) -> Path:
    """Write the network with the names that optimum gives; its layout has a scalar timestep and open sizes."""
    net: Any = (small_conditional_unet if conditional else small_unet)(**TINY).eval()
    timestep = torch.tensor(5) if exporter == "optimum" else torch.tensor([5, 5])
    tensors = {"sample": torch.randn(2, net.config.in_channels, 8, 8), "timestep": timestep}
    if conditional:
        tensors["encoder_hidden_states"] = torch.randn(2, 7, 16)
    model, names = PositionalModel(net, tuple(tensors), None), list(tensors)
    common: dict[str, Any] = {"input_names": names, "output_names": ["out_sample"], "opset_version": opset}
    with torch.no_grad(), warnings.catch_warnings(), quiet_exporter():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = (tuple({0: BATCH} for _ in names),)
            program = torch.onnx.export(
                model, tuple(tensors.values()), dynamo=True, dynamic_shapes=shapes, verbose=False, **common
            )
            assert program is not None
            program.save(str(file))
            return file
        images = {0: "batch_size", 2: "height", 3: "width"} if exporter == "optimum" else {0: "batch"}
        axes = {"sample": images, "out_sample": images, "encoder_hidden_states": {0: "batch_size", 1: "sequence"}}
        if exporter == "legacy":
            axes["timestep"] = {0: "batch"}
        kept = {name: axis for name, axis in axes.items() if name in (*names, "out_sample")}
        torch.onnx.export(model, tuple(tensors.values()), str(file), dynamo=False, dynamic_axes=kept, **common)
    return file


def conditions_of(conditional: bool) -> dict[str, np.ndarray[Any, Any]]:
    rows = np.random.default_rng(5).standard_normal((2, 7, 16)).astype(np.float32)
    return {"encoder_hidden_states": rows} if conditional else {}


@pytest.mark.parametrize(
    ("exporter", "opset", "conditional"),
    [("legacy", 17, False), ("optimum", 14, True), ("dynamo", 17, False)],
)
def test_an_export_is_brought_into_one_form(
    tmp_path: Path, context: Context, exporter: str, opset: int, conditional: bool
) -> None:
    source = export(tmp_path / "net.onnx", exporter, opset, conditional)
    schedule = Schedule.named("ddpm-linear")
    program = import_onnx(
        source, context.folder, schedule=schedule, deployment=Deployment.of(schedule, "ddim", 2), size=(8, 8)
    )
    passes = [Normalize(), FreezeTime(), LowerNorms()]
    after = run_passes(program, passes, replace(context, conditions=conditions_of(conditional)))

    assert after.signature.sample == "sample"
    assert after.model.opset_imports[""] >= 18
    assert all(value.shape is not None for node in after.graph for value in node.outputs)
    left = counts(after.graph)
    assert not {"InstanceNormalization", "Dropout", "Identity"} & left.keys()
    assert left["LayerNormalization"] >= 8
    divisors = [node.inputs[1] for node in after.graph if node.op_type == "Div"]
    assert not [v for v in divisors if v is not None and is_constant(v) and np.all(numpy_of(v) == 1)]


def test_an_older_export_compiles(tmp_path: Path) -> None:
    """Its residual sums are divided by one, in front of quantizers."""
    source = export(tmp_path / "net.onnx", "legacy", 14, conditional=False)
    bundle = compile_model(source, tmp_path / "b", recipe="w8a8", size=(8, 8), **{**SMALL, "steps": 2})

    kernels = bundle.manifest.kernels
    assert kernels.integer > 2 * kernels.floating
    x = np.random.default_rng(1).standard_normal((2, *bundle.sample_shape)).astype(np.float32)
    want = np.asarray(open_session(source, threads=2).run(None, {"sample": x, "timestep": np.array([500, 500])})[0])
    error = bundle.denoiser(threads=2)(x, 500) - want
    assert 10 * np.log10(np.mean(want**2) / np.mean(error**2)) > 12
