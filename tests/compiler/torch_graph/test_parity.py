"""The torch module of a graph computes what the executor computes, at every value, for graphs of every source.

Float graphs as they were imported and after the passes, and the graph with quantizers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mezzotint.compiler.core.execute import Feeds, feeds
from mezzotint.compiler.core.pipeline import Context, run_passes
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.frontend.from_torch import load_model
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


def traced(net: torch.nn.Module, tensors: dict[str, torch.Tensor], folder: Path, steps: int) -> Program:
    """A diffusers network as torch's older exporter writes it, which takes less time than the newer one."""
    names = list(tensors)
    with torch.no_grad(), warnings.catch_warnings(), quiet_exporter():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            PositionalModel(net.eval(), tuple(names), None),
            tuple(tensors.values()),
            str(folder / "traced.onnx"),
            dynamo=False,
            input_names=names,
            output_names=["out_sample"],
            opset_version=14,
            dynamic_axes={name: {0: "batch"} for name in (*names, "out_sample")},
        )
    return import_onnx(folder / "traced.onnx", folder, schedule=SCHEDULE, deployment=deployed(steps))


def digits(folder: Path, request: pytest.FixtureRequest) -> Program:
    tensors = {"sample": torch.randn(2, 1, 16, 16), "timestep": torch.tensor([5, 5])}
    return traced(load_model(DIGITS / "unet"), tensors, folder, 1)


def conditional(folder: Path, request: pytest.FixtureRequest) -> Program:
    """A UNet2DConditionModel with GEGLU and cross-attention."""
    net = small_conditional_unet(block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4)
    tensors = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 5])}
    return traced(net, {**tensors, "encoder_hidden_states": torch.randn(2, TOKENS, 16)}, folder, 2)


def transformer(folder: Path, request: pytest.FixtureRequest) -> Program:
    """A DiT, as torch's newer exporter writes it."""
    return import_onnx(request.getfixturevalue("dit"), folder, schedule=SCHEDULE, deployment=deployed(2))


def opset_13(folder: Path, request: pytest.FixtureRequest) -> Program:
    file = write(hand_written(opset=13), folder / "hand.onnx")
    return import_onnx(file, folder, schedule=SCHEDULE, deployment=deployed(2))


def tiny(folder: Path, request: pytest.FixtureRequest) -> Program:
    return tiny_program(steps=2)


SOURCES: dict[Callable[[Path, pytest.FixtureRequest], Program], str] = {
    tiny: "w4a8",
    opset_13: "w8a8",
    conditional: "w8a8-steps",
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
        parts = {name: part for name, part in parts.items() if part.any()}  # 1 % of an untrained bias is nothing
        for name, part in list(parts.items())[:: max(1, len(parts) // 2)]:
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


def test_one_batch_mixes_timesteps(case: Case) -> None:
    """It equals a call for each sample, and gradients reach each weight and the rows of all timesteps."""
    program = case.quantized
    times = torch.tensor(program.deployment.timesteps)
    sample = torch.from_numpy(case.inputs[program.signature.sample][:1])
    x = sample * torch.linspace(0.5, 1, len(times)).reshape(-1, 1, 1, 1)
    rows = {name: torch.from_numpy(np.repeat(case.inputs[name][:1], len(times), 0)) for name in program.conditions()}
    tables: list[Quantizer] = []
    for model, most_differ in ((case.float_model, 1e-5), (program.model, 0.05)):  # one rounded the other way spreads
        graph = to_torch(model, signature=program.signature)
        mixed = graph.per_sample(x, times, rows)[0]
        alone = [graph.module(*(part[i : i + 1] for part in (x, times, *rows.values())))[0] for i in range(len(times))]
        distance = (mixed - torch.cat(alone)).detach().abs().max() / mixed.detach().abs().max()
        assert float(distance) < most_differ
        mixed.square().sum().backward()
        assert [name for name, weight in graph.weights.items() if weight.grad is None or not weight.grad.any()] == []
        tables = [q for q in graph.quantizers.values() if isinstance(q, Quantizer) and q.rows]
    assert bool(tables) == bool(program.require_plan().groups)
    for table in tables:
        gradient = table.scale.grad
        assert gradient is not None
        # A softmax that is all but constant has gradients that vanish in float32.
        assert gradient.reshape(len(times), -1).any(1).all() or gradient.abs().max() < 1e-6


def test_taps_come_behind_the_outputs(case: Case) -> None:
    model = case.quantized.model
    pairs = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    pair, integers = next((n, v) for n in pairs if (v := n.inputs[0]) is not None and v.producer() is not None)
    tapped = pair.outputs[0].name or ""
    graph = to_torch(model, signature=case.imported.signature, taps=[tapped])
    results = graph.module(*(torch.from_numpy(np.asarray(case.inputs[name])) for name in graph.inputs))
    assert graph.outputs == (case.imported.signature.output, tapped)
    assert len(results) == 2
    for wrong in ("nothing", integers.name or ""):
        with pytest.raises(PassError, match=wrong):
            to_torch(model, taps=[wrong])


def test_the_code_shows_the_graph(case: Case) -> None:
    """One line for each value, which calls the operation by its name with sizes as numbers."""
    code = to_torch(case.imported.model, signature=case.imported.signature).module.code
    called = set(re.findall(r"= onnx_(\w+)\(", code))
    assert called == {node.op_type for node in case.imported.graph if node.op_type != "Constant"}


def test_samples_that_cannot_have_timesteps_of_their_own_are_refused() -> None:
    model = tiny_program().model
    graph = to_torch(model)
    x, t = torch.zeros(2, 1, 8, 8), torch.tensor([0, 5])
    with pytest.raises(PassError, match=r"conditions \[\], not \['text'\]"):
        graph.per_sample(x, t, {"text": x})
    with pytest.raises(PassError, match="batch of 2"):
        replace(graph, fixed_batch=2).per_sample(x, t)
