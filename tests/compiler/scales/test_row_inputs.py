"""Rows from outside: the clone computes what the graph computes with the row that it would have gathered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Plan, Program, Site
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.nodes import counts, name_of
from mezzotint.compiler.scales.row_inputs import find_tables, replace_tables, stacked, table_quantizers, with_row_inputs
from mezzotint.passes.channel_scales import ChannelScales
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from tests.helpers.tiny import SIGNATURE, tiny_program

STEPS = 4


def steps(gain: float = -1000.0) -> tuple[Pass, ...]:
    """Recipe w8a8-steps with one row for two calls; at a `gain` of -1000 dB every activation gets a table.

    Without tables for each channel, which settle_scales, for which this is made, refuses.
    """
    settings = {"step_scales.gain": gain, "group_steps.groups": 2, "group_steps.method": "even"}
    passes = with_options(RECIPES["w8a8-steps"], settings).passes
    return tuple(step for step in passes if not isinstance(step, ChannelScales))


@pytest.fixture
def quantized(context: Context) -> Program:
    return pipeline.run_passes(tiny_program(steps=STEPS), steps(), context)


def outputs(
    program: Program, context: Context, call: int, factor: float = 1.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(of the graph, of the clone) at one call, whose row is handed over times `factor`."""
    assert program.plan is not None
    tables = find_tables(program, "test")
    scales, zeros = stacked(program)
    x = np.random.default_rng(call).standard_normal((2, *program.shape)).astype(np.float32)
    t, row = program.deployment.timesteps[call], program.plan.groups[call]
    rows = {tables.scales_row: (scales[row] * factor).astype(np.float32), tables.zeros_row: zeros[row]}
    # Without onnxruntime's fusions both compute the same operations one by one.
    with Executor(program.model, context.folder, threads=1, level="none") as graph:
        want = graph.call(SIGNATURE, x, t)["epsilon"]
    with Executor(with_row_inputs(program.model, tables), context.folder, threads=1, level="none") as clone:
        return want, clone.call(SIGNATURE, x, t, rows)["epsilon"]


@pytest.mark.parametrize("call", range(STEPS))
def test_the_clone_computes_the_same(quantized: Program, context: Context, call: int) -> None:
    want, got = outputs(quantized, context, call)
    np.testing.assert_array_equal(got, want)
    want, got = outputs(quantized, context, call, factor=1.01)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(got, want)


def test_no_table_is_left_in_the_clone_and_the_graph_keeps_its_own(quantized: Program) -> None:
    tables = find_tables(quantized, "test")
    before = counts(quantized.graph)
    clone = with_row_inputs(quantized.model, tables)
    assert not {tables.scales, tables.zeros} & set(clone.graph.initializers)
    assert {tables.scales, tables.zeros} <= set(quantized.graph.initializers)
    assert [name_of(v) for v in clone.graph.inputs][-2:] == [tables.scales_row, tables.zeros_row]
    assert len(clone.graph.inputs) == len(quantized.graph.inputs) + 2
    assert counts(quantized.graph) == before
    columns = len(table_quantizers(quantized))
    assert list(clone.graph.inputs[-1].shape or ()) == [columns]


def test_tables_are_replaced(quantized: Program) -> None:
    tables = find_tables(quantized, "test")
    scales, zeros = stacked(quantized)
    replace_tables(quantized.graph, tables, scales * np.float32(2), zeros)
    with pytest.raises(PassError, match="no table of scales with the plan's rows"):
        find_tables(quantized, "test")
    replace_tables(quantized.graph, tables, scales, zeros)
    assert find_tables(quantized, "test") == tables


def test_one_table_alone(context: Context) -> None:
    """A lookup of one column has no Split behind it."""
    program = pipeline.run_passes(tiny_program(steps=STEPS), steps()[:-3], context)
    assert program.plan is not None
    tabled = pipeline.run_passes(program, steps()[-3:-2], context)
    assert tabled.plan is not None
    kept = Site("gated")  # what the convolution `down` reads
    quantizers = {**program.plan.quantizers, kept: tabled.plan.quantizers[kept]}
    program = replace(program, plan=replace(program.plan, quantizers=quantizers))
    program = pipeline.run_passes(program, steps()[-2:], context)
    want, got = outputs(program, context, 1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("changed", ["scale", "zero_point"])
def test_a_plan_that_the_graph_does_not_hold_is_refused(quantized: Program, changed: str) -> None:
    assert quantized.plan is not None
    site, q = next(iter(table_quantizers(quantized).items()))
    other = (
        replace(q, scale=q.scale * np.float32(1.01)) if changed == "scale" else replace(q, zero_point=q.zero_point + 1)
    )
    plan = Plan({**quantized.plan.quantizers, site: other}, quantized.plan.islands, quantized.plan.groups)
    what = "scales" if changed == "scale" else "zero points"
    with pytest.raises(PassError, match=f"no table of {what}") as caught:
        find_tables(replace(quantized, plan=plan), "settle_scales")
    assert caught.value.where == "settle_scales"
    assert "insert_qdq" in str(caught.value.hint)
