"""Grids as functions of trained offsets: where they start, what moves, and that all of it is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mezzotint.compiler.core.execute import Executor, feeds
from mezzotint.compiler.core.pipeline import run_passes
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.lowering.lower import lower
from mezzotint.compiler.torch_graph.convert import TorchGraph, to_torch
from mezzotint.compiler.torch_graph.parity import value_gaps
from mezzotint.compiler.torch_graph.quantizers import Quantizer
from mezzotint.compiler.torch_graph.write_back import plan_grids, write_back
from mezzotint.compiler.training.fit_scales import rounded_weights
from mezzotint.compiler.training.learned_scales import LearnedScales, learned_grids, moved
from mezzotint.compiler.training.range_networks import RangeNetworks
from mezzotint.compiler.training.units import find_units, quantizers_of_units
from mezzotint.passes.recipes.files import load_recipe
from tests.helpers.tiny import context_in, tiny_program

STEPS = 2


@pytest.fixture(params=["w8a8", "w8a8-steps", "w4a8"], scope="module")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Static scales; tables, for channels too; and weights rounded by GPTQ to widths by row."""
    context = context_in(tmp_path_factory.mktemp("program"), samples=2)
    return run_passes(tiny_program(steps=STEPS), load_recipe(request.param).passes, context)


def converted(program: Program) -> tuple[TorchGraph, LearnedScales]:
    graph = to_torch(program.model, signature=program.signature)
    plan_grids(program, graph)
    names, _ = quantizers_of_units(program.graph, find_units(program, "network"), weights=True, activations=True)
    (chosen,) = names.values()
    grids = learned_grids(graph, chosen, rounded_weights(program.graph, graph, chosen), zero_points=True)
    groups = program.require_plan().groups
    return graph, LearnedScales(grids, max(groups, default=-1) + 1, groups)


def test_offsets_of_zero_change_nothing(program: Program) -> None:
    graph, learned = converted(program)
    before = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    learned.settle()
    for name, tensor in graph.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert {name.rpartition(".")[2] for name in learned.of_row(0)} >= {"scale", "zero_point"}


def test_what_was_learned_is_what_the_file_computes(program: Program, tmp_path: Path) -> None:
    graph, learned = converted(program)
    torch.manual_seed(0)
    with torch.no_grad():
        for offsets in (learned.offsets, learned.shared, *learned.row_offsets):
            offsets.copy_(0.1 * torch.randn_like(offsets))
    learned.settle()
    written = write_back(program, graph, tmp_path, "test")
    x = np.random.default_rng(1).standard_normal((2, *program.shape)).astype(np.float32)
    by_name = {value.name or "": value for value in program.graph.inputs}
    for timestep in program.deployment.timesteps:
        inputs = feeds(by_name, program.signature, x, timestep, {})
        assert [gap for gap in value_gaps(written.model, graph, inputs, tmp_path) if not gap.small] == []
        with Executor(lower(written), tmp_path, threads=1, level="none") as executor:
            lowered = executor.run(inputs)[program.signature.output]
        with torch.no_grad():
            want = graph.module(*(torch.from_numpy(np.asarray(inputs[name])) for name in graph.inputs))[0].numpy()
        # Biases are rounded to int32 there: single integers move by a step.
        assert np.square(lowered - want).mean() < 2e-3 * np.square(want).mean()
    trained = [q for q in written.require_plan().quantizers.values() if q.by == "test"]
    assert len(trained) > 20


def test_a_batch_moves_its_own_row_only(program: Program) -> None:
    graph, learned = converted(program)
    sum(tensor.sum() for tensor in learned.of_row(1).values()).backward()  # type: ignore[union-attr]
    tables = any(part.rows for part in graph.quantizers.values() if isinstance(part, Quantizer))
    assert tables == bool(program.require_plan().groups)
    assert [offsets.grad is not None for offsets in learned.row_offsets] == ([False, True] if tables else [])
    assert learned.offsets.grad is not None and bool(torch.any(learned.offsets.grad != 0))


def test_weights_that_are_rounded_keep_their_integers(program: Program) -> None:
    _, learned = converted(program)
    kept = [grid for grid in learned.static if grid.weight is not None]
    assert bool(kept) == any(record.name == "round_weights" for record in program.history)
    before = [grid.part.integers(grid.weight) for grid in kept if grid.weight is not None]
    with torch.no_grad():
        learned.offsets.fill_(0.3)
    learned.settle()
    for grid, integers in zip(kept, before, strict=True):
        assert grid.weight is not None and torch.equal(grid.part.integers(grid.weight), integers)
        assert torch.allclose(grid.part(grid.weight), grid.weight)


def test_networks_of_the_timestep_start_at_the_tables_and_move_all_rows(tmp_path: Path) -> None:
    """By TDQ's recipe, through the written graph."""
    context = context_in(tmp_path, samples=2)
    steps = [step for step in load_recipe("tdq").passes if step.name != "learn_scales"]
    program = run_passes(tiny_program(steps=4), steps, context)
    graph, _ = converted(program)
    (names,) = quantizers_of_units(program.graph, find_units(program, "network"), weights=False, activations=True)[
        0
    ].values()
    grids = learned_grids(graph, names, {}, zero_points=True)
    learned = LearnedScales(grids, 4, {0}, lambda count: RangeNetworks(count, [999, 749, 499, 249], 1000.0, 0))
    assert learned.timed and not learned.row_offsets and len(learned.parameter_groups(1.0)) == 2
    before = {grid.path: grid.part.scale.detach().clone() for grid in learned.timed}
    for row in range(4):
        tables = learned.of_row(row)
        for path, scale in before.items():
            torch.testing.assert_close(tables[f"{path}.scale"], scale, rtol=1e-6, atol=0)
    optimizer = torch.optim.Adam(learned.parameter_groups(1e-2))
    for _ in range(2):
        optimizer.zero_grad()
        sum(tensor.log().sum() for name, tensor in learned.of_row(0).items() if name.endswith(".scale")).backward()  # type: ignore[union-attr]
        optimizer.step()
    learned.settle()
    for grid in learned.timed:
        factors = grid.part.scale.detach() / before[grid.path]
        assert torch.all(factors < 1) and len(torch.unique(factors)) == 4, "all rows move, each by its own share"
    written = write_back(program, graph, tmp_path, "test")
    x = np.random.default_rng(1).standard_normal((2, *program.shape)).astype(np.float32)
    by_name = {value.name or "": value for value in program.graph.inputs}
    inputs = feeds(by_name, program.signature, x, program.deployment.timesteps[1], {})
    assert [gap for gap in value_gaps(written.model, graph, inputs, tmp_path) if not gap.small] == []


@pytest.mark.parametrize("shape", [(), (3,)])
def test_offsets_move_the_two_ends_by_their_factors(shape: tuple[int, ...]) -> None:
    part = Quantizer(torch.full(shape, 0.5), torch.full(shape, 5.0), 0, 15, axis=1 if shape else None)
    offsets = torch.zeros(2, *(shape or (1,)))
    offsets[0], offsets[1] = 0.2, -0.4
    scale, zero = moved(part, part.scale.detach(), part.zero_point.detach(), offsets)
    assert scale.shape == zero.shape == shape
    torch.testing.assert_close(-zero * scale, torch.full(shape, -2.5) * np.exp(0.2))
    torch.testing.assert_close((15 - zero) * scale, torch.full(shape, 5.0) * np.exp(-0.4))
    scale, zero = moved(part, part.scale.detach(), part.zero_point.detach(), offsets[:1])
    torch.testing.assert_close(scale, torch.full(shape, 0.5) * np.exp(0.2))
    assert torch.equal(zero, part.zero_point)


def test_tables_of_other_rows_than_the_plans_are_refused() -> None:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Quantizer(torch.ones(3), torch.zeros(3), 0, 15, rows=True)

    module = Holder()
    graph = TorchGraph(module, {}, {"part": module.part}, {}, ())  # type: ignore[arg-type]
    with pytest.raises(PassError, match="a table has 3 rows, and the plan 2"):
        LearnedScales(learned_grids(graph, ["part"], {}, zero_points=True), 2, ())
