"""The torch module of a graph computes what the executor computes, at every value, for graphs of every source.

Float graphs as they were imported and after the passes, and the graph with quantizers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mezzotint.compiler.core.execute import Feeds, feeds
from mezzotint.compiler.core.pipeline import Context, run_passes
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.frontend.from_torch import import_folder
from mezzotint.compiler.frontend.torch_example import PositionalModel, quiet_exporter
from mezzotint.compiler.torch_graph.convert import TorchGraph, to_torch
from mezzotint.compiler.torch_graph.parity import value_gaps
from mezzotint.compiler.torch_graph.quantizers import Quantizer
from mezzotint.io.sources import DIGITS
from mezzotint.passes.recipes.files import load_recipe
from mezzotint.runtime.sampling.deployment import Deployment
from tests.helpers.models import hand_written, small_conditional_unet, write
from tests.helpers.tiny import context_in, short_schedule, tiny_program

TOKENS = 7
SCHEDULE = short_schedule()


@dataclass(frozen=True)
class Case:
    """A source, imported and compiled to its graph with quantizers, and the inputs of one call."""

    imported: Program
    quantized: Program
    inputs: Feeds

    @property
    def float_model(self) -> ir.Model:
        return self.quantized.require_float_model()


def deployed(steps: int) -> Deployment:
    return Deployment.of(SCHEDULE, "ddim", steps)


def digits(folder: Path, request: pytest.FixtureRequest) -> Program:
    return import_folder(
        DIGITS / "unet", folder, schedule=SCHEDULE, deployment=deployed(1), size=(16, 16), name="digits", threads=1
    )


def traced(folder: Path, request: pytest.FixtureRequest) -> Program:
    """A UNet2DConditionModel with GEGLU and cross-attention, from torch's older exporter."""
    net = small_conditional_unet(block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4).eval()
    tensors = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 5])}
    tensors["encoder_hidden_states"] = torch.randn(2, TOKENS, 16)
    names, batch = list(tensors), {0: "batch"}
    with torch.no_grad(), warnings.catch_warnings(), quiet_exporter():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            PositionalModel(net, tuple(names), None),
            tuple(tensors.values()),
            str(folder / "traced.onnx"),
            dynamo=False,
            input_names=names,
            output_names=["out_sample"],
            opset_version=14,
            dynamic_axes=dict.fromkeys((*names, "out_sample"), batch),
        )
    return import_onnx(folder / "traced.onnx", folder, schedule=SCHEDULE, deployment=deployed(2))


def transformer(folder: Path, request: pytest.FixtureRequest) -> Program:
    return import_onnx(request.getfixturevalue("dit"), folder, schedule=SCHEDULE, deployment=deployed(2))


def opset_13(folder: Path, request: pytest.FixtureRequest) -> Program:
    file = write(hand_written(opset=13), folder / "hand.onnx")
    return import_onnx(file, folder, schedule=SCHEDULE, deployment=deployed(2))


def tiny(folder: Path, request: pytest.FixtureRequest) -> Program:
    return tiny_program(steps=2)


SOURCES: dict[Callable[[Path, pytest.FixtureRequest], Program], str] = {
    tiny: "w4a8",
    opset_13: "w8a8",
    traced: "w8a8-steps",
    transformer: "w8a8",
    digits: "w8a8-steps",
}


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source.__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("program")
    program = request.param(folder, request)
    rng = np.random.default_rng(0)
    rows = {}
    for name, value in program.conditions().items():
        assert value.shape is not None and value.dtype is not None
        shape = [2, *(n if isinstance(n, int) else TOKENS for n in list(value.shape)[1:])]
        rows[name] = (rng.standard_normal(shape) if len(shape) > 1 else np.arange(2)).astype(value.dtype.numpy())
    context: Context = context_in(folder, samples=2, conditions=rows)
    quantized = run_passes(program, load_recipe(SOURCES[request.param]).passes, context)
    x = rng.standard_normal((2, *program.shape)).astype(np.float32)
    inputs = {value.name or "": value for value in program.graph.inputs}
    return Case(program, quantized, feeds(inputs, program.signature, x, program.deployment.timesteps[0], rows))


def faults(model: ir.Model, graph: TorchGraph, case: Case, folder: Path) -> list[str]:
    return [d.value for d in value_gaps(model, graph, case.inputs, folder) if not d.small]


def test_every_value_is_that_of_the_executor(case: Case, tmp_path: Path) -> None:
    for model in (case.imported.model, case.float_model, case.quantized.model):
        graph = to_torch(model, signature=case.imported.signature)
        found = value_gaps(model, graph, case.inputs, tmp_path)
        assert [d for d in found if not d.small] == []
        assert {*graph.outputs} <= {d.value for d in found} or graph.quantizers


def test_a_planted_error_of_one_percent_is_found(case: Case, tmp_path: Path) -> None:
    """In weights of the float graph and in scales of quantizers: a weight on the grid rounds back to its integer."""
    signature = case.imported.signature
    for model in (case.float_model, case.quantized.model):
        graph = to_torch(model, signature=signature)
        parts = {name: q.scale for name, q in graph.quantizers.items() if isinstance(q, Quantizer)} or graph.weights
        for name, part in list(parts.items())[:: max(1, len(parts) // 3)]:
            kept = part.detach().clone()
            with torch.no_grad():
                part.mul_(1.01)
                assert faults(model, graph, case, tmp_path), name
                part.copy_(kept)


def test_weights_and_quantizers_are_those_of_the_graph(case: Case) -> None:
    graph = to_torch(case.quantized.model, signature=case.imported.signature)
    initializers = case.quantized.graph.initializers
    assert all(list(weight.shape) == list(initializers[name].shape or ()) for name, weight in graph.weights.items())
    written = [node.name for node in case.quantized.graph if node.op_type == "QuantizeLinear"]
    assert list(graph.quantizers) == written
