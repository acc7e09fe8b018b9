"""Which constants of a graph are weights: those of layers and of normalizations, on whatever way they are read."""

from __future__ import annotations

import onnx_ir as ir

from ..graph.nodes import is_constant, is_op
from ..graph.ops import MOVERS, layers

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NORMALIZATIONS = (
    "LayerNormalization",
    "RMSNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "BatchNormalization",
)
_ON_THE_WAY = (*MOVERS, "QuantizeLinear", "DequantizeLinear", "Clip", "Cast", "Identity", "Gather", "Split", "Slice")


def weights_of(graph: ir.Graph) -> list[ir.Value]:
    """Return the constants that a layer reads as weight or bias, and the affine parameters of normalizations.

    A normalization that lower_norms wrote as several nodes has its parameters in the Mul and the Add behind it.
    """
    found: dict[ir.Value, None] = {}

    def add(value: ir.Value | None) -> None:
        source = _source(value)
        if source is not None and is_constant(source) and source.dtype is not None and source.dtype.is_floating_point():
            found[source] = None

    biases = {layer.bias_add: layer.bias for layer in layers(graph) if layer.bias_add is not None}
    normal: set[ir.Value] = set()  # values that are a normalization's output, its affine part done or not
    for node in graph:
        if is_op(node, *_LAYERS):
            for value in node.inputs[1:]:
                add(value)
        elif node in biases:
            add(biases[node])
        elif is_op(node, *_NORMALIZATIONS):
            normal.add(node.outputs[0])
            for value in node.inputs[1:3]:
                add(value)
        elif is_op(node, "Mul", "Add") and len(at := [i for i, v in enumerate(node.inputs) if v in normal]) == 1:
            parameter = node.inputs[1 - at[0]]
            if is_constant(parameter):
                add(parameter)
                normal.add(node.outputs[0])
        elif is_op(node, *MOVERS) and node.inputs[0] in normal:
            normal.add(node.outputs[0])
    return list(found)


def _source(value: ir.Value | None) -> ir.Value | None:
    """Return the value that quantizers, lookups of a row and movements of data start from."""
    while value is not None and (node := value.producer()) is not None and is_op(node, *_ON_THE_WAY):
        value = node.inputs[0]
    return value
