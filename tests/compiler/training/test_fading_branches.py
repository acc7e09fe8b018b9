"""Branches that are added to quantized weights: what they carry at the start, how they fade, and that they go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call

from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rounding.layer_inputs import Inputs
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.torch_graph.convert import TorchGraph, to_torch
from mezzotint.compiler.torch_graph.quantizers import Quantizer
from mezzotint.compiler.torch_graph.write_back import plan_grids
from mezzotint.compiler.training.fading_branches import GONE, FadingBranches, strengths
from mezzotint.passes.distill import Distill
from tests.passes.test_distill import program, trained, unjudged  # noqa: F401  fixtures


def converted(of: Program, rank: int) -> tuple[TorchGraph, FadingBranches, list[tuple[str, Quantizer, Inputs]]]:
    graph = to_torch(of.model, signature=of.signature)
    plan_grids(of, graph)
    floats = {layer.name: layer for layer in layers(of.require_float_model().graph)}
    inputs = [Inputs.of(weight, floats, "test") for weight in find_weights(of.graph)]
    branches = FadingBranches(graph, inputs, rank)
    paths = {module: path for path, module in graph.module.named_modules()}
    found = []
    for one in inputs:
        part = graph.quantizers[one.weight.quantize.name or ""]
        assert isinstance(part, Quantizer)
        found.append((f"{paths[part]}.branch", part, one))
    return graph, branches, found


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (0.0, [1, 1, 1, 1, 1]),
        (GONE / 6, [1, 1, 0.5, 0.5, 0.5]),
        (GONE / 4, [1, 1] + 3 * [(1 - np.sqrt(0.5)) / 2]),
        (GONE / 3, [1, 1, 0, 0, 0]),
        (GONE / 2, [1, 0.5, 0, 0, 0]),
        (GONE * 5 / 6, [0.5, 0, 0, 0, 0]),
        (GONE, [0, 0, 0, 0, 0]),
        (1.0, [0, 0, 0, 0, 0]),
    ],
)
def test_the_rank_halves_from_phase_to_phase(share: float, wanted: list[float]) -> None:
    np.testing.assert_allclose(strengths(5, share), wanted, atol=1e-12)


def test_a_branch_carries_the_largest_part_of_what_was_rounded_away(program: Program) -> None:  # noqa: F811
    """In steps of the grid: no other weights of this rank are nearer to the float ones."""
    for rank in (1, 1000):
        graph, branches, found = converted(program, rank)
        values = branches.values(0.0)
        assert len(found) == len(values) > 5
        for path, part, inputs in found:
            parameter = graph.weights[inputs.weight.value.name or ""]
            floats = torch.tensor(numpy_of(inputs.floats))
            scale = part.parameters_for(parameter)[0]
            lost = ((floats - part(parameter)) / scale).detach().reshape(len(floats), -1)
            sizes = torch.linalg.svdvals(lost)
            with_branch = functional_call(part, {"branch": values[path]}, (parameter,))
            left = ((floats - with_branch) / scale).detach().square().sum().sqrt()
            assert float(left) == pytest.approx(float(sizes[rank:].square().sum().sqrt()), abs=1e-3), path


def test_nothing_is_left_behind_the_half(program: Program) -> None:  # noqa: F811
    _, branches, _ = converted(program, 4)
    early, late = branches.values(0.1 * GONE), branches.values(0.9 * GONE)
    assert all(late[path].abs().sum() < early[path].abs().sum() for path in early)
    assert branches.values(GONE) == branches.values(1.0) == {}


@pytest.mark.usefixtures("unjudged")
def test_training_with_a_branch_starts_nearer_and_writes_integers_alone(
    program: Program,  # noqa: F811
    context: Context,
) -> None:
    options: dict[str, Any] = {"floats": False, "iterations": 8, "checks": 1, "weight_steps": 1e-9}
    plain, branched = (trained(program, context, **options, branch_rank=rank) for rank in (0, 1000))
    with_branch, without = (np.log(p.training[-1].losses) for p in (branched, plain))
    assert with_branch[0] < without[0] - 2, "the first step sees the float weights"
    np.testing.assert_allclose(with_branch[4:], without[4:], rtol=1e-4)
    for one, other in zip(find_weights(plain.graph), find_weights(branched.graph), strict=True):
        np.testing.assert_array_equal(one.rows(), other.rows())
    nodes = [[node.op_type for node in p.graph] for p in (program, branched)]
    assert nodes[0] == nodes[1]


def test_a_branch_needs_weights_that_move() -> None:
    with pytest.raises(RecipeError, match="branches are added to weights that move"):
        Distill(weights="none", branch_rank=4)


def test_factors_get_gradients(program: Program) -> None:  # noqa: F811
    _, branches, found = converted(program, 2)
    path, part, _ = found[0]
    (group,) = branches.parameter_groups(0.01)
    branch = branches.values(0.0)[path]
    functional_call(part, {"branch": branch}, (torch.zeros_like(branch),)).square().sum().backward()
    left, right = group["params"][:2]
    assert left.grad is not None and right.grad is not None
    assert left.grad.abs().sum() > 0 and right.grad.abs().sum() > 0
