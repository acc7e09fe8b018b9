"""fold_time: golden pairs, and the numbers at the deployed timesteps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import counts, is_constant, numpy_of
from mezzotint.compiler.graph.ops import layers, time_table
from mezzotint.passes.fold_time import FoldTime
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.normalize import Normalize
from mezzotint.runtime.signature import Images
from tests.conftest import Check
from tests.helpers import golden
from tests.helpers.tiny import SIGNATURE

FOLDED = {"folds": 1}  # in every other case the graph stays as it is


@pytest.mark.parametrize("case", golden.cases("fold_time"))
def test_golden(check_golden: Check, case: str) -> None:
    conditions = {"label": np.array([0, 2])} if case == "label" else None
    after = check_golden(FoldTime(), case, conditions=conditions)
    folded = FOLDED.get(case, 0)
    assert after.history[0].note == f"{folded} additions moved into convolutions"
    additions = counts(golden.before("fold_time", case).graph)["Add"]
    assert counts(after.graph)["Add"] == additions - folded


def test_there_is_a_golden_pair_for_each_reason() -> None:
    assert set(golden.cases("fold_time")) == {"folds", "second_reader", "not_along_channels", "no_bias", "label"}


@pytest.fixture
def frozen(tiny: Program, context: Context) -> Program:
    return pipeline.run_passes(tiny, [Normalize(), FreezeTime()], context)


def outputs(model: ir.Model, context: Context, timesteps: tuple[float, ...]) -> Images:
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    with Executor(model, context.folder, threads=2) as executor:
        return np.stack([executor.call(SIGNATURE, x, t)["epsilon"] for t in timesteps])


def check_same(want: Images, got: Images) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(np.abs(want).max()))


def test_the_numbers_stay(frozen: Program, context: Context) -> None:
    after = pipeline.run_passes(frozen, [FoldTime()], context)
    timesteps = frozen.deployment.timesteps
    want = outputs(frozen.model, context, timesteps)
    check_same(want, outputs(after.model, context, timesteps))
    table = next(v for n, v in after.graph.initializers.items() if n.endswith("_bias_table"))
    table.const_value = ir.tensor(numpy_of(table) * np.float32(1.01), name=table.name)
    with pytest.raises(AssertionError):
        check_same(want, outputs(after.model, context, timesteps))


def test_both_blocks_are_folded_and_stay_layers(frozen: Program, context: Context) -> None:
    after = pipeline.run_passes(frozen, [FoldTime()], context)
    assert counts(after.graph)["Add"] == counts(frozen.graph)["Add"] - 2
    biases = {layer.name: layer.bias for layer in layers(after.graph) if layer.kind == "conv"}
    assert biases.keys() == {layer.name for layer in layers(frozen.graph) if layer.kind == "conv"}
    timed = {name for name, bias in biases.items() if bias is not None and not is_constant(bias)}
    assert timed == {"b1_conv1", "b2_conv1"}
    for name in timed:
        bias = biases[name]
        found = None if bias is None else time_table(bias)
        assert found is not None
        assert numpy_of(found[0]).shape == (3, 16)
