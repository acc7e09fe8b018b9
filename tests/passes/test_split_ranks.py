"""split_ranks: the same function in two parts, a residual on integer kernels and a float branch beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program, Site
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.graph.ops import BRANCH, layers
from mezzotint.compiler.graph.require import inputs
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.round_weights import RoundWeights
from mezzotint.passes.split_ranks import SplitRanks
from tests.conftest import Check
from tests.helpers.tiny import tiny_program

SPLIT = SplitRanks(rank=8, share=0.3, iterations=3, calls=2, columns=1024, samples=2)


def quantized(context: Context, *rewrites: Pass, behind: tuple[Pass, ...] = ()) -> Program:
    static = (Observe(), ChooseScales(weight_bits=4), InsertQdq(), *behind)
    return pipeline.run_passes(tiny_program(), [Normalize(), *rewrites, *static], context)


def sqnr(program: Program, context: Context) -> float:
    """Of epsilon in dB on noise, beside the float network."""
    float_model = tiny_program()
    x = np.random.default_rng(7).standard_normal((8, *program.shape)).astype(np.float32)
    outputs = []
    for each in (float_model, program):
        with Executor(each.model, context.folder, threads=1, level="basic") as executor:
            found = executor.call(each.signature, x, each.deployment.timesteps[1])["epsilon"]
            outputs.append(found.astype(np.float64))
    return float(10 * np.log10(np.sum(outputs[0] ** 2) / np.sum((outputs[0] - outputs[1]) ** 2)))


def test_both_kinds_of_layers_are_split(check_golden: Check) -> None:
    step = SplitRanks(rank=1, share=0.6, weight_bits=3, calls=3, activation_bits="float", weighting="none")
    after = check_golden(step, "both_kinds")
    assert after.history[-1].note.startswith("3 of 3 weights have a branch of rank 1 to 1")
    assert len(list(layers(after.graph))) == 5  # as before: branches are no layers


def test_residuals_are_rounded_and_branches_are_islands(context: Context) -> None:
    whole = quantized(context, behind=(RoundWeights(calls=2, samples=2),))
    split = quantized(context, SPLIT, behind=(RoundWeights(calls=2, samples=2),))
    assert sqnr(split, context) > sqnr(whole, context) + 2
    plan = split.require_plan()
    beside = {name: reason for name, reason in plan.islands.items() if "branch of low rank" in reason}
    branches = [node for node in split.graph if BRANCH in node.metadata_props]
    assert len(branches) == 2 * int(split.history[1].note.split()[0]) > 10
    assert {node.name for node in branches} == set(beside)
    assert set(plan.islands) - set(beside) == set(whole.require_plan().islands)
    scales = [{v.value: q.scale for v, q in p.require_plan().quantizers.items()} for p in (whole, split)]
    assert scales[1]["down"] < 0.8 * scales[0]["down"]  # the grid of the residual's own output


@pytest.mark.parametrize("weighting", ["output", "none"])
def test_the_graph_computes_the_same(context: Context, weighting: Any) -> None:
    before = pipeline.run_passes(tiny_program(), [Normalize()], context)
    after = pipeline.run_passes(before, [replace(SPLIT, weighting=weighting)], context)  # the pipeline compares both
    changed = {
        layer.name
        for layer in layers(after.graph)
        if layer.weight is not None
        and not np.array_equal(numpy_of(layer.weight), numpy_of(before.graph.initializers[name_of(layer.weight)]))
    }
    assert changed == {node.metadata_props[BRANCH] for node in after.graph if BRANCH in node.metadata_props}
    assert {"conv_in", "conv_out"} <= set(after.refused) and "island" in after.refused["conv_in"]


def test_one_program_chooses_widths_and_ranks(context: Context) -> None:
    after = quantized(context, replace(SPLIT, mean_bits=6.0, share=0.1, iterations=2))
    plan, widths = after.require_plan(), after.widths
    assert set(widths.values()) <= {2, 4, 8} and len(set(widths.values())) > 1
    bits = total = 0
    for layer in layers(after.require_float_model().graph):
        if layer.name in widths:
            quantizer = plan.quantizers[Site(name_of(layer.weight))]
            assert quantizer.bits == widths[layer.name]
            size = numpy_of(layer.require_weight()).size
            bits, total = bits + size * quantizer.bits, total + size
    branches = [node for node in after.graph if BRANCH in node.metadata_props]
    values = sum(numpy_of(inputs(node, 2)[1]).size for node in branches)
    assert values > 0 and 5.5 < (bits + 16 * values) / total <= 6.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"share": 1.0}, "share is 1"),
        ({"mean_bits": 4.0, "widths": (4, 4)}, "widths is"),
        ({"mean_bits": 4.0, "widths": (1, 4)}, "widths is"),
        ({"iterations": 0}, "iterations is 0"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"split_ranks.{message}"):
        SplitRanks(**options)
