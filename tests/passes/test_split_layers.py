"""split_layers: which layers are parted, and that the parts compute the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import counts, numpy_of
from mezzotint.passes.split_layers import SplitLayers
from tests.helpers.tiny import program_of

GEGLU = "hidden, gate = Split <axis = {axis}{count}> (wide{sizes}) gelu = Sigmoid (gate) out = Mul (hidden, gelu)"
BIASED = "plain = MatMul (rows, w) wide = Add (plain, b)"
ALSO_READ = f"{BIASED} more = ReduceMean (wide)"


def network(layer: str, split: str, also: str = "out") -> ir.Model:
    rng = np.random.default_rng(0)
    weight, bias = (", ".join(f"{v:.3f}" for v in rng.standard_normal(n)) for n in (24, 6))
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[batch,4,4,4] sample, int64[batch] timestep) => (float[batch,M,3] epsilon)
    <int64[3] flattened = {{0, 16, 4}}, float[4,6] w = {{{weight}}}, float[6] b = {{{bias}}}, int64[2] even = {{3, 3}}>
    {{ rows = Reshape (sample, flattened) {layer} {split} epsilon = Add (out, {also}) }}"""
    return infer_shapes(ir.from_onnx_text(text))


@pytest.mark.parametrize("layer", [BIASED, "wide = MatMul (rows, w)"])
@pytest.mark.parametrize(("count", "sizes"), [(", num_outputs = 2", ""), ("", ", even")])
def test_each_part_becomes_a_layer(context: Context, layer: str, count: str, sizes: str) -> None:
    """The pipeline compares the graphs before and after."""
    program = program_of(network(layer, GEGLU.format(axis=-1, count=count, sizes=sizes)), shape=(4, 4, 4))
    after = pipeline.run_passes(program, [SplitLayers()], context)
    found = counts(after.graph)
    assert (found["Split"], found["MatMul"]) == (0, 2) and "1 layers" in after.history[-1].note
    weights = [numpy_of(node.inputs[1]) for node in after.graph if node.op_type == "MatMul"]  # type: ignore[arg-type]
    whole = numpy_of(program.graph.initializers["w"])
    np.testing.assert_array_equal(np.concatenate(weights, axis=1), whole)


@pytest.mark.parametrize(
    ("layer", "axis", "also"),
    [
        (BIASED, 1, "out"),  # parts of the tokens
        (ALSO_READ, -1, "more"),
        ("w2 = Add (w, w) wide = MatMul (rows, w2)", -1, "out"),  # no constant
    ],
)
def test_others_stay(context: Context, layer: str, axis: int, also: str) -> None:
    split = GEGLU.format(axis=axis, count=", num_outputs = 2", sizes="")
    program = program_of(network(layer, split, also), shape=(4, 4, 4))
    after = pipeline.run_passes(program, [SplitLayers()], context)
    assert "0 layers" in after.history[-1].note and counts(after.graph) == counts(program.graph)
