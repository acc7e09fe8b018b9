"""Layers in float that onnxruntime would quantize by itself: between a DequantizeLinear and a QuantizeLinear.

Such a layer, an island between two quantized ones, looks like a quantized group without the quantizers of its weight
and bias. onnxruntime writes those itself (WeightBiasQuantization; measured on 1.31.1 for Conv and Gemm, and for MatMul
with Add of two dimensions): it rounds the weight to nearest, and the layer that a plan keeps in float runs on integers.
So a LeakyRelu of slope 1, which changes nothing, stands between the layer and the QuantizeLinear. onnxruntime makes it
a part of the float kernel, where it costs nothing.
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph.nodes import Builder, Names, consumers, is_constant, is_op, name_of, replace_use
from ..graph.ops import is_mover

_SEEN_THROUGH = ("Slice", "MaxPool", "Identity", "DepthToSpace")


def keep_islands(graph: ir.Graph) -> int:
    """Write the LeakyRelu behind each such layer, and return their number; edits the graph."""
    names, count = Names(graph), 0
    for node in list(graph):
        if not is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul") or not _reads_quantized(node):
            continue
        out = node.outputs[0]
        readers = consumers(out)
        if is_op(node, "MatMul") and len(readers) == 1 and is_op(readers[0], "Add") and not out.is_graph_output():
            out = readers[0].outputs[0]
            readers = consumers(out)
        chosen = [reader for reader in readers if _is_quantized(reader)]
        producer = out.producer()
        if not chosen or producer is None:
            continue
        build = Builder(graph, names, after=producer)
        same = build.op("LeakyRelu", [out], f"{name_of(out)}_in_float", like=out, attributes={"alpha": 1.0})
        for reader in chosen:
            replace_use(reader, out, same)
        count += 1
    return count


def _reads_quantized(node: ir.Node) -> bool:
    """Return whether a node multiplies dequantized data, past movers, by a float constant."""
    value, weight = node.inputs[:2]
    if weight is None or not is_constant(weight) or weight.dtype != ir.DataType.FLOAT:
        return False
    at = None if value is None else value.producer()
    while at is not None and (is_mover(at) or is_op(at, *_SEEN_THROUGH)):
        at = None if at.inputs[0] is None else at.inputs[0].producer()
    return is_op(at, "DequantizeLinear")


def _is_quantized(node: ir.Node) -> bool:
    """Return whether a node quantizes what it reads, or moves it to one that does."""
    if is_op(node, "QuantizeLinear"):
        return True
    moves = is_mover(node) or is_op(node, *_SEEN_THROUGH)
    return moves and any(_is_quantized(reader) for reader in consumers(node.outputs[0]))
