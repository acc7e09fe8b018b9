"""clean_qdq: golden pairs, and that the numbers stay bit by bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import counts, numpy_of
from mezzotint.passes.clean_qdq import CleanQdq
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.signature import Images
from tests.conftest import Check
from tests.helpers import golden
from tests.helpers.tiny import SIGNATURE


@pytest.mark.parametrize("case", golden.cases("clean_qdq"))
def test_golden(check_golden: Check, context: Context, case: str) -> None:
    after = check_golden(CleanQdq(), case)
    assert outputs(after.model, context, (2, 4, 4)).std() > 0
    check_equal(golden.before("clean_qdq", case), after.model, context, (2, 4, 4))


def outputs(model: ir.Model, context: Context, shape: tuple[int, ...]) -> Images:
    """What onnxruntime computes node by node, without fusing anything."""
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    with Executor(model, context.folder, threads=2, level="none") as executor:
        return np.asarray(executor.call(SIGNATURE, x, 333)["epsilon"], np.float32)


def check_equal(before: ir.Model, after: ir.Model, context: Context, shape: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(outputs(after, context, shape), outputs(before, context, shape))


def test_the_tiny_denoiser_keeps_every_bit(tiny: Program, context: Context) -> None:
    before = pipeline.run_passes(tiny, RECIPES["w8a8"].passes[:-1], context)
    after = pipeline.run_passes(before, [CleanQdq()], context)
    check_equal(before.model, after.model, context, tiny.shape)
    assert counts(after.graph)["QuantizeLinear"] < counts(before.graph)["QuantizeLinear"]
    scale = after.graph.initializers["tokens_scale"]
    scale.const_value = ir.tensor(numpy_of(scale) * np.float32(1.01), name=scale.name)
    with pytest.raises(AssertionError):
        check_equal(before.model, after.model, context, tiny.shape)


def test_cleaning_twice_is_cleaning_once(tiny: Program, context: Context) -> None:
    once = pipeline.run_passes(tiny, RECIPES["w8a8"].passes, context)
    twice = pipeline.run_passes(once, [CleanQdq()], context)
    assert golden.to_text(twice.model) == golden.to_text(once.model)
