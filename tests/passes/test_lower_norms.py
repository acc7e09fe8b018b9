"""lower_norms: golden pairs."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import counts, model_text
from mezzotint.passes.lower_norms import LowerNorms
from tests.conftest import Check
from tests.helpers import golden
from tests.helpers.tiny import program_of


@pytest.mark.parametrize("case", golden.cases("lower_norms"))
def test_golden(check_golden: Check, case: str) -> None:
    check_golden(LowerNorms(), case, shape=(4, 4, 4))


INSTANCE = """<ir_version: 10, opset_import: ["" : {opset}]>
    g (float[batch,4,4,4] sample, int64[batch] timestep) => (float[batch,4,4,4] epsilon)
    <int64[3] groups = {{0, 2, -1}}, int64[4] images = {{0, 4, 4, 4}}, float[2] scale = {{{scale}}},
     float[2] shift = {{{shift}}}>
    {{ flat = Reshape (sample, groups) normal = InstanceNormalization (flat, scale, shift)
       epsilon = Reshape (normal, images) }}"""


@pytest.mark.parametrize(
    ("opset", "scale", "shift", "lowered"),
    [
        (17, "1, 1", "0, 0", True),
        (16, "1, 1", "0, 0", False),
        (17, "1, 1.01", "0, 0", False),
        (17, "1, 1", "0, 0.01", False),
    ],
)
def test_instance_norms_that_only_normalize_are_lowered(
    context: Context, opset: int, scale: str, shift: str, lowered: bool
) -> None:
    """LayerNormalization is of opset 17; scales and shifts would have to be kept."""
    model = infer_shapes(ir.from_onnx_text(INSTANCE.format(opset=opset, scale=scale, shift=shift)))
    before = model_text(model)
    after = pipeline.run_passes(program_of(model, shape=(4, 4, 4)), [LowerNorms()], context)
    assert ("LayerNormalization" in counts(after.graph)) == lowered
    assert lowered or model_text(after.model) == before
