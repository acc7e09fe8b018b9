"""Levels of codebooks as functions of trained offsets: their gradient, their grid, and what is written of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call

from mezzotint.compiler.core.pipeline import Context, run_passes
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.torch_graph.convert import TorchGraph, to_torch
from mezzotint.compiler.torch_graph.quantizers import Quantizer
from mezzotint.compiler.torch_graph.write_back import plan_grids, write_back
from mezzotint.compiler.training.learned_levels import LearnedLevels
from mezzotint.passes.distill import Distill
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from tests.helpers.tiny import context_in, tiny_program
from tests.passes.test_distill import QUICK, unjudged  # noqa: F401  a fixture


@pytest.fixture(params=["row", "tensor"], scope="module")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The tiny denoiser with weights of 2 bits on levels of rows, or of 1 bit on levels of whole weights."""
    bits = 2 if request.param == "row" else 1
    options = {"choose_scales.weight_bits": bits, "choose_levels.tables": request.param, "round_weights.refits": 0}
    steps = with_options(RECIPES["ganq"], options).passes
    return run_passes(tiny_program(steps=2), steps, context_in(tmp_path_factory.mktemp("p"), samples=2))


def converted(program: Program) -> tuple[TorchGraph, list[str]]:
    graph = to_torch(program.model, signature=program.signature)
    plan_grids(program, graph)
    return graph, [weight.quantize.name or "" for weight in find_weights(program.graph)]


def quantizer_of(graph: TorchGraph, name: str) -> tuple[str, Quantizer]:
    part = graph.quantizers[name]
    assert isinstance(part, Quantizer)
    return next(path for path, module in graph.module.named_modules() if module is part), part


@pytest.mark.parametrize(("axis", "count"), [(0, 4), (1, 4), (None, 4), (0, 2)])
def test_a_level_has_the_gradient_of_its_weights(axis: int | None, count: int) -> None:
    """dE/dL[k] is the sum of s dE/dw over the weights with the code k; weights between the outer levels keep theirs.

    Of two levels, so do those beyond them by half their distance.
    """
    rng = np.random.default_rng(0)
    shape = (6, count) if axis is not None else count
    table = np.sort(rng.choice(np.arange(-120, 121), shape, replace=False), axis=-1).astype(np.int64)
    scale = torch.tensor(rng.uniform(0.5, 2, 6) if axis is not None else 1.5, dtype=torch.float32)
    part = Quantizer(scale, torch.zeros_like(scale), -127, 127, axis)
    part.use_levels(table.astype(np.int8))
    assert part.levels is not None
    weight = torch.tensor(rng.normal(0, 60, (6, 6)), dtype=torch.float32, requires_grad=True)
    levels = part.levels.clone().requires_grad_()
    slopes = torch.tensor(rng.normal(size=(6, 6)), dtype=torch.float32)
    (functional_call(part, {"levels": levels}, (weight,)) * slopes).sum().backward()

    wanted = np.zeros_like(table, np.float64)
    passed = np.zeros((6, 6))
    for i, j in np.ndindex(6, 6):
        row = {0: i, 1: j}.get(axis if axis is not None else -1)
        own = table if row is None else table[row]
        s = float(scale) if row is None else float(scale[row])
        k = int(np.abs(own * s - weight[i, j].item()).argmin())
        wanted[k if row is None else (row, k)] += s * float(slopes[i, j])
        room = (own[-1] - own[0]) / 2 if count == 2 else 0
        passed[i, j] = float(slopes[i, j]) * ((own[0] - room) * s < weight[i, j].item() < (own[-1] + room) * s)
    assert levels.grad is not None and weight.grad is not None
    np.testing.assert_allclose(levels.grad.numpy(), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weight.grad.numpy(), passed, rtol=1e-5)


def test_offsets_of_zero_change_nothing(program: Program) -> None:
    graph, names = converted(program)
    learned = LearnedLevels(graph, names)
    values = learned.values()
    for name in names:
        path, part = quantizer_of(graph, name)
        for buffer in ("levels", "qmin", "qmax"):
            assert torch.equal(values[f"{path}.{buffer}"], getattr(part, buffer)), name


def test_moved_levels_are_whole_sorted_and_written(program: Program, context: Context) -> None:
    graph, names = converted(program)
    learned = LearnedLevels(graph, names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for offsets in learned.offsets:
            offsets.copy_(torch.randn(offsets.shape, generator=generator))
    learned.settle()
    after = write_back(program, graph, context.folder, "test")
    plan, before = after.require_plan(), program.require_plan()
    changed = 0
    for site, quantizer in plan.quantizers.items():
        if quantizer.levels is not None:
            levels = quantizer.levels.astype(int)
            assert np.abs(levels).max() <= 127 and (np.diff(levels, axis=-1) >= 0).all()
            new = not np.array_equal(levels, np.asarray(before.quantizers[site].levels))
            assert (quantizer.by == "test") == new, "islands have no quantizer"
            changed += new
    assert changed == len(find_weights(program.graph))
    for weight in find_weights(after.graph):
        _, part = quantizer_of(graph, weight.quantize.name or "")
        codes = weight.rows() / weight.scale()[:, None]
        assert part.levels is not None
        table = np.broadcast_to(part.levels, (len(codes), part.levels.shape[-1]))
        np.testing.assert_allclose(np.abs(codes[:, :, None] - table[:, None]).min(axis=2), 0, atol=1e-3)


@pytest.mark.parametrize("program", ["row"], indirect=True)
@pytest.mark.usefixtures("unjudged")
def test_training_moves_levels_and_lowers_the_loss(program: Program, context: Context) -> None:
    """Beside weights that hardly move, on the same batches."""
    options = {**QUICK, "weight_steps": 1e-9, "float_shares": 1e-9, "floats": False, "iterations": 20, "checks": 1}
    one = replace(context, threads=1)
    moved = run_passes(program, [Distill(**options, level_steps=5e-3)], one)
    still = run_passes(program, [Distill(**options)], one)
    new, old = (float(np.mean(np.log(p.training[-1].losses[-8:]))) for p in (moved, still))
    assert new < old - 0.1
    tables = [
        [q.levels for q in p.require_plan().quantizers.values() if q.levels is not None] for p in (program, moved)
    ]
    assert any(not np.array_equal(old, new) for old, new in zip(*tables, strict=True))


def test_what_cannot_work_is_refused(context: Context) -> None:
    with pytest.raises(RecipeError, match="levels move with their weights, which stay"):
        Distill(weights="none", level_steps=0.1)
    program = run_passes(tiny_program(steps=2), RECIPES["w8a8"].passes, context)
    with pytest.raises(RecipeError, match="levels are those of all rows, and some rows stay"):
        Distill(critical=0.5, level_steps=0.1)
    with pytest.raises(RecipeError, match="no weight has levels to train"):
        run_passes(program, [Distill(**QUICK, level_steps=0.1)], context)
