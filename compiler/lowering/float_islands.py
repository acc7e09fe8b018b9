"""Layers in float inside a quantized graph: written so that onnxruntime leaves them in float, and runs them fast.

`keep_islands`: a layer in float that onnxruntime would quantize by itself, between a DequantizeLinear and a
QuantizeLinear.

Such a layer, an island between two quantized ones, looks like a quantized group without the quantizers of its weight
and bias. onnxruntime writes those itself (WeightBiasQuantization; measured on 1.31.1 for Conv and Gemm, and for MatMul
with Add of two dimensions): it rounds the weight to nearest, and the layer that a plan keeps in float runs on integers.
So a LeakyRelu of slope 1, which changes nothing, stands between the layer and the QuantizeLinear. onnxruntime makes it
a part of the float kernel, where it costs nothing. Of a layer whose weight is dequantized it would quantize the bias.

`unpack_transposed`: the integers of a transposed convolution's weight. onnxruntime does not compute a DequantizeLinear
of constants in advance: each call would dequantize the weight, a third of the time of a 2x2 kernel (512 to 256
channels, 8x8 pixels, 1.31.1). It does compute Cast and Mul, which give the same numbers, when it builds the session.
"""

from __future__ import annotations

import onnx_ir as ir

from ..core.formats import along
from ..graph.nodes import Builder, Names, consumers, is_constant, is_op, name_of, numpy_of, remove_dead, replace_use
from ..graph.ops import is_mover
from ..graph.require import inputs
from .qdq import dequantizer

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
    """Return whether a float kernel multiplies dequantized data, past movers, by a constant."""
    value, weight = node.inputs[:2]
    pair = dequantizer(weight)
    stored = is_op(node, "ConvTranspose") and pair is not None and is_constant(pair.inputs[0])
    if weight is None or not (stored or (is_constant(weight) and weight.dtype == ir.DataType.FLOAT)):
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


def unpack_transposed(graph: ir.Graph) -> int:
    """Write Cast and Mul for the DequantizeLinear of each transposed convolution's weight; return their number."""
    names, count = Names(graph), 0
    for node in list(graph):
        pair = dequantizer(inputs(node, 2)[1]) if is_op(node, "ConvTranspose") else None
        if pair is None:
            continue
        integers, scale, zero = inputs(pair, 3)
        if not is_constant(integers) or not is_constant(scale) or numpy_of(zero).any():
            continue
        axis = pair.attributes["axis"].as_int() if "axis" in pair.attributes and numpy_of(scale).ndim else None
        build, stem = Builder(graph, names, before=node), name_of(integers)
        array = along(numpy_of(scale), axis, len(integers.shape or ()))
        factors = build.constant(f"{stem}_factors", array)
        to = {"to": int(ir.DataType.FLOAT)}
        floats = build.op(
            "Cast", [integers], f"{stem}_cast", dtype=ir.DataType.FLOAT, shape=integers.shape, attributes=to
        )
        replace_use(node, pair.outputs[0], build.op("Mul", [floats, factors], f"{stem}_float", like=floats))
        count += 1
    if count:
        remove_dead(graph)
    return count
