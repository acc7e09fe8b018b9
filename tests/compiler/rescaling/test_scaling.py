"""scaling: factors for each input channel change nothing, for every kind of layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import Names, name_of, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rescaling.scaling import (
    channel_axis,
    column_ranges,
    divide_value,
    input_channels,
    multiplied_weight,
    multiply_weight,
    row_lengths,
    row_ranges,
)

CASES = {
    "conv": ("y = Conv <pads = [1, 1, 1, 1]> (x, w)", (1, 6, 5, 5), (4, 6, 3, 3), 6),
    "grouped": ("y = Conv <group = 3, pads = [1, 1, 1, 1]> (x, w)", (1, 6, 5, 5), (9, 2, 3, 3), 6),
    "depthwise": ("y = Conv <group = 6> (x, w)", (1, 6, 5, 5), (6, 1, 1, 1), 6),
    "matmul": ("y = MatMul (x, w)", (2, 3, 6), (6, 5), 6),
    "gemm": ("y = Gemm (x, w)", (3, 6), (6, 5), 6),
    "turned": ("y = Gemm <transB = 1> (x, w)", (3, 6), (5, 6), 6),
}


def model_of(case: str) -> ir.Model:
    body, x_shape, w_shape, _ = CASES[case]
    sizes = ",".join(str(n) for n in x_shape)
    head = f"g (float[{sizes}] x) => (float y) <float{list(w_shape)} w>"
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]> {head} {{ {body} }}""")
    weight = model.graph[0].inputs[1]
    assert weight is not None
    weight.const_value = ir.tensor(np.random.default_rng(1).standard_normal(w_shape).astype(np.float32), name="w")
    model.graph.register_initializer(weight)
    return infer_shapes(model)


def outputs(model: ir.Model, context: Context, case: str) -> npt.NDArray[np.float32]:
    x = np.random.default_rng(2).standard_normal(CASES[case][1]).astype(np.float32)
    with Executor(model, context.folder, threads=1) as executor:
        return np.asarray(executor.run({"x": x})["y"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("planted", [1.0, 1.01])
def test_the_product_stays(case: str, planted: float, context: Context) -> None:
    model = model_of(case)
    want = outputs(model, context, case)
    (layer,) = layers(model.graph)
    assert input_channels(layer) == CASES[case][3]
    factors = np.random.default_rng(3).uniform(0.1, 10, input_channels(layer))
    names, weight = Names(model.graph), layer.weight
    x = layer.activations[0]
    divide_value(model.graph, names, x, [layer.node], factors, channel_axis(layer))
    factors[2] *= planted
    multiply_weight(model.graph, names, layer, factors)
    assert name_of(layer.node.inputs[0]) == "x_divided" and layer.node.inputs[1] is not weight
    difference = np.abs(outputs(model, context, case) - want).max() / np.abs(want).max()
    assert (difference < 1e-5) == (planted == 1.0)


def test_the_old_weight_is_left_alone_for_others() -> None:
    model = model_of("conv")
    (layer,) = layers(model.graph)
    assert layer.weight is not None
    before = numpy_of(layer.weight).copy()
    multiply_weight(model.graph, Names(model.graph), layer, np.full(6, 2.0))
    assert np.array_equal(numpy_of(layer.weight), before)
    with pytest.raises(ValueError, match="has 6 input channels"):
        multiply_weight(model.graph, Names(model.graph), layer, np.ones(5))


@pytest.mark.parametrize("case", CASES)
def test_ranges_are_those_of_the_weight_with_its_factors(case: str) -> None:
    """Input channels as `multiply_weight` counts them, output channels as the product has them."""
    (layer,) = layers(model_of(case).graph)
    rng = np.random.default_rng(4)
    columns = rng.uniform(0.1, 10, input_channels(layer))
    weight = numpy_of(layer.weight) if layer.weight is not None else np.zeros(0)
    axis = layer.weight_axis or 0
    rows = rng.uniform(0.1, 10, [weight.shape[axis]])
    along = rows.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
    others = tuple(d for d in range(weight.ndim) if d != axis)
    np.testing.assert_allclose(
        row_ranges(layer, columns), np.abs(multiplied_weight(layer, columns)).max(axis=others), rtol=1e-5
    )
    np.testing.assert_allclose(row_lengths(layer) ** 2, (weight.astype(np.float64) ** 2).sum(axis=others), rtol=1e-5)
    for channel, largest in enumerate(column_ranges(layer, rows)):
        only = np.zeros(input_channels(layer))
        only[channel] = 1
        np.testing.assert_allclose(largest, np.abs(multiplied_weight(layer, only) * along).max(), rtol=1e-5)
