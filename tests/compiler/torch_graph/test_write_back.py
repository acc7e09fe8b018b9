"""What was trained in torch is what the graph, the plan and the lowered file hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mezzotint.compiler.core.execute import Executor, Feeds, feeds
from mezzotint.compiler.core.pipeline import run_passes
from mezzotint.compiler.core.program import Program, Site
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.lowering.lower import lower
from mezzotint.compiler.lowering.qdq import fold_weights
from mezzotint.compiler.torch_graph.convert import TorchGraph, to_torch
from mezzotint.compiler.torch_graph.parity import value_gaps
from mezzotint.compiler.torch_graph.quantizers import Quantizer
from mezzotint.compiler.torch_graph.soft_rounding import SoftRounding
from mezzotint.compiler.torch_graph.write_back import plan_grids, write_back
from mezzotint.passes.recipes.files import load_recipe
from tests.helpers.tiny import context_in, tiny_program

RECIPES = ("w8a8", "w8a8-steps", "w4a8")
STEPS = 2


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Program]:
    """The tiny denoiser by a recipe, compiled once."""

    @cache
    def program_by(recipe: str) -> Program:
        context = context_in(tmp_path_factory.mktemp("program"), samples=2)
        return run_passes(tiny_program(steps=STEPS), load_recipe(recipe).passes, context)

    return program_by


@pytest.fixture(params=RECIPES)
def program(request: pytest.FixtureRequest, compiled: Callable[[str], Program]) -> Program:
    return compiled(request.param)


@pytest.fixture
def static(compiled: Callable[[str], Program]) -> Program:
    """A program of its own, with static scales."""
    return compiled("w8a8").with_model(compiled("w8a8").model.clone())


def call(program: Program, timestep: int) -> Feeds:
    x = np.random.default_rng(1).standard_normal((2, *program.shape)).astype(np.float32)
    inputs = {value.name or "": value for value in program.graph.inputs}
    return feeds(inputs, program.signature, x, program.deployment.timesteps[timestep], {})


def converted(program: Program) -> TorchGraph:
    graph = to_torch(program.model, signature=program.signature)
    plan_grids(program, graph)
    return graph


def parts(graph: TorchGraph) -> list[Quantizer]:
    return [part for part in dict.fromkeys(graph.quantizers.values()) if isinstance(part, Quantizer)]


def changed(program: Program, seed: int = 0) -> TorchGraph:
    """The module with every weight, scale and zero point moved a little."""
    graph = converted(program)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in graph.weights.values():
            weight.mul_(1 + 0.05 * torch.randn_like(weight)).add_(0.01 * torch.randn_like(weight))
        for part in parts(graph):
            part.scale.mul_(1 + 0.1 * torch.rand_like(part.scale))
            if part.qmin.ndim == 0 and part.qmin == 0:
                part.zero_point.add_(4 * torch.rand_like(part.zero_point) - 2)
    return graph


def test_the_written_graph_computes_what_the_module_does(program: Program, tmp_path: Path) -> None:
    graph = changed(program)
    written = write_back(program, graph, tmp_path, "test")
    for timestep in range(STEPS):
        found = value_gaps(written.model, graph, call(program, timestep), tmp_path)
        assert [gap for gap in found if not gap.small] == []
    old = value_gaps(program.model, graph, call(program, 0), tmp_path)
    assert [gap for gap in old if not gap.small]


def test_weights_round_to_the_integers_of_the_module(program: Program, tmp_path: Path) -> None:
    graph = changed(program)
    written = write_back(program, graph, tmp_path, "test").model
    expected = {}
    for node in program.graph:
        value = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        part = graph.quantizers[node.name or ""] if value is not None else None
        if value is not None and value.const_value is not None and isinstance(part, Quantizer):
            weight = graph.weights[value.name or ""]
            expected[node.name] = part.integers(weight).numpy()
            assert not np.array_equal(expected[node.name], part.integers(torch.tensor(numpy_of(value))).numpy())
    of_layer = {n.name: n.inputs[0] for n in written.graph if n.name in expected}
    assert expected.keys() == of_layer.keys()
    readers = {name: next(iter(v.uses())).node for name, v in of_layer.items() if v is not None}
    outputs = {name: readers[name].outputs[0] for name in readers}
    last = {name: _end(value) for name, value in outputs.items()}
    fold_weights(written.graph)
    for name, reader in last.items():
        value = reader.inputs[0]
        assert value is not None
        np.testing.assert_array_equal(numpy_of(value).astype(np.float32), expected[name])


def _end(value: ir.Value) -> ir.Node:
    """The DequantizeLinear behind a QuantizeLinear."""
    node = next(iter(value.uses())).node
    return node if node.op_type == "DequantizeLinear" else _end(node.outputs[0])


def test_the_plan_is_that_of_the_graph(program: Program, tmp_path: Path) -> None:
    """Insert the quantizers of the new plan into the new weights: each is that of the module."""
    graph = changed(program)
    written = write_back(program, graph, tmp_path, "test")
    plan, before = written.require_plan(), program.require_plan()
    trained = {site for site, q in plan.quantizers.items() if q.by == "test"}
    assert plan.quantizers.keys() == before.quantizers.keys() and trained
    scales = {tuple(np.sort(part.scale.detach().numpy().reshape(-1)).tolist()) for part in parts(graph)}
    for site in trained:
        new, old = plan.quantizers[site], before.quantizers[site]
        assert new.scale.shape == old.scale.shape and new.scale.dtype == old.scale.dtype
        assert new.zero_point.dtype == old.zero_point.dtype and new.table == old.table
        assert tuple(np.sort(new.scale.reshape(-1)).tolist()) in scales
    assert len({plan.quantizers[site].scale.tobytes() for site in trained}) == len(parts(graph))


def test_nothing_changes_where_nothing_was_trained(program: Program, tmp_path: Path) -> None:
    written = write_back(program, converted(program), tmp_path, "test")
    assert all(q.by != "test" for q in written.require_plan().quantizers.values())
    for name, value in program.graph.initializers.items():
        np.testing.assert_array_equal(numpy_of(written.graph.initializers[name]), numpy_of(value))


def test_the_lowered_graph_runs_what_was_trained(program: Program, tmp_path: Path) -> None:
    """Biases are rounded to int32 there, so single integers move by a step, and the output by far less."""
    graph = changed(program)
    written = write_back(program, graph, tmp_path, "test")
    inputs = call(program, 0)
    with Executor(lower(written), tmp_path, threads=1, level="none") as executor:
        lowered = executor.run(inputs)[program.signature.output]
    with Executor(lower(program), tmp_path, threads=1, level="none") as executor:
        untrained = executor.run(inputs)[program.signature.output]
    with torch.no_grad():
        expected = graph.module(*(torch.from_numpy(np.asarray(inputs[name])) for name in graph.inputs))[0].numpy()
    error = np.square(lowered - expected).mean() / np.square(expected).mean()
    assert error < 2e-3 < np.square(untrained - expected).mean() / np.square(expected).mean()


def test_soft_rounding_is_written_hard(program: Program, tmp_path: Path) -> None:
    graph = converted(program)
    name, node = next((n.name or "", n) for n in program.graph if n.op_type == "QuantizeLinear" and _is_weight(n))
    part = graph.quantizers[name]
    assert isinstance(part, Quantizer) and node.inputs[0] is not None
    soft = SoftRounding(part, graph.weights[node.inputs[0].name or ""])
    with torch.no_grad():
        soft.v.neg_()  # every weight to the other neighbour
    quantizers = {**graph.quantizers, name: soft}
    written = write_back(program, replace(graph, quantizers=quantizers), tmp_path, "test").model
    value = next(n for n in written.graph if n.name == name).inputs[0]
    assert value is not None
    np.testing.assert_array_equal(part.integers(torch.tensor(numpy_of(value))).numpy(), soft.integers().numpy())
    np.testing.assert_array_equal(numpy_of(value), soft.hard().numpy())


def _is_weight(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].const_value is not None


def test_a_weight_of_mixed_widths_stays_on_the_grid_of_each_row(static: Program, tmp_path: Path) -> None:
    program = static
    plan, site = program.require_plan(), Site("b1_w2")
    bits = np.where(np.arange(16) % 2, 4, 8).astype(np.int8)
    program = replace(
        program, plan=replace(plan, quantizers={**plan.quantizers, site: replace(plan.quantizers[site], row_bits=bits)})
    )
    with pytest.raises(PassError, match="not on the grid of the plan"):
        write_back(program, moved(to_torch(program.model, signature=program.signature)), tmp_path, "test")
    graph = moved(converted(program))
    written = write_back(program, graph, tmp_path, "test")
    rows = np.abs(numpy_of(written.graph.initializers["b1_w2"])).reshape(16, -1).max(1)
    assert np.all(rows <= ((1 << (bits - 1)) - 1) * written.require_plan().quantizers[site].scale * 1.0001)


def test_a_weight_of_a_codebook_stays_on_its_levels(static: Program, tmp_path: Path) -> None:
    program = static
    plan, site = program.require_plan(), Site("b1_w2")
    levels = np.sort(np.random.default_rng(0).integers(-127, 128, (16, 8)), axis=1).astype(np.int8)
    quantizers = {**plan.quantizers, site: replace(plan.quantizers[site], levels=levels)}
    program = replace(program, plan=replace(plan, quantizers=quantizers))
    with pytest.raises(PassError, match="not on the grid of the plan"):
        write_back(program, moved(to_torch(program.model, signature=program.signature)), tmp_path, "test")
    written = write_back(program, moved(converted(program)), tmp_path, "test")
    after = written.require_plan().quantizers[site]
    rows = numpy_of(written.graph.initializers["b1_w2"]).reshape(16, -1) / after.scale[:, None]
    np.testing.assert_allclose(np.abs(rows[:, :, None] - levels[:, None]).min(axis=2), 0, atol=1e-4)
    np.testing.assert_array_equal(after.levels, levels)


def moved(graph: TorchGraph) -> TorchGraph:
    with torch.no_grad():
        graph.weights["b1_w2"].mul_(1.01)
    return graph


def not_finite(graph: TorchGraph) -> None:
    with torch.no_grad():
        next(iter(graph.weights.values())).view(-1)[0] = float("nan")


def unknown(graph: TorchGraph) -> None:
    assert isinstance(graph.quantizers, dict)
    graph.quantizers["nowhere"] = next(iter(graph.quantizers.values()))


@pytest.mark.parametrize(
    ("fault", "message"), [(not_finite, "is not finite after training"), (unknown, "no QuantizeLinear 'nowhere'")]
)
def test_what_cannot_be_written_is_an_error(
    program: Program, tmp_path: Path, fault: Callable[[TorchGraph], None], message: str
) -> None:
    graph = changed(program)
    fault(graph)
    with pytest.raises(PassError, match=message):
        write_back(program, graph, tmp_path, "test")


def test_a_scale_that_two_quantizers_share_stays_tied_or_is_refused(static: Program, tmp_path: Path) -> None:
    program = static
    first, second = [n for n in program.graph if n.op_type == "QuantizeLinear" and not _is_weight(n)][:2]
    for node in (second, _end(second.outputs[0])):
        node.replace_input_with(1, first.inputs[1])
    graph = converted(program)
    one, two = (graph.quantizers[n.name or ""] for n in (first, second))
    assert isinstance(one, Quantizer) and isinstance(two, Quantizer) and one is not two
    with torch.no_grad():
        one.scale.mul_(1.5)
    with pytest.raises(PassError, match="were trained apart"):
        write_back(program, graph, tmp_path, "test")
    alone = {name: part for name, part in graph.quantizers.items() if part is not two}
    with pytest.raises(PassError, match="belongs to other quantizers too"):
        write_back(program, replace(graph, quantizers=alone), tmp_path, "test")
    with torch.no_grad():
        two.scale.copy_(one.scale)
    written = write_back(program, graph, tmp_path, "test").graph
    scale = next(n for n in written if n.name == second.name).inputs[1]
    assert scale is not None and numpy_of(scale) == one.scale.detach().numpy()


def test_a_bias_without_room_raises_the_scale_of_its_weight(static: Program, tmp_path: Path) -> None:
    """A channel that training has nearly silenced: the weight moves to a coarser grid, and the file is lowered."""
    program = static
    graph = converted(program)
    node = next(n for n in program.graph if n.op_type == "QuantizeLinear" and n.name == "b1_w2_quantized")
    part = graph.quantizers[node.name or ""]
    assert isinstance(part, Quantizer)
    with torch.no_grad():
        part.scale[3] = 1e-10
        graph.weights["b1_w2"][3] = 1e-10
    written = write_back(program, graph, tmp_path, "test")
    scale = written.require_plan().quantizers[Site("b1_w2")].scale
    assert scale[3] > 1e-10 and "larger scales" in written.note
    weight = numpy_of(written.graph.initializers["b1_w2"])
    np.testing.assert_array_equal(np.rint(weight[3] / scale[3]) * scale[3], weight[3])
    lower(written)
