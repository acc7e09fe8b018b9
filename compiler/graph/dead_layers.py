"""Layers whose weights are all zero: their outputs are constants, and so is what only they feed.

A convolution, Gemm or MatMul with zero weights returns its bias for every input. Its range has no width, so the scales
behind it are meaningless: an integer layer that reads it gets a bias beyond int32. So these values become constants for
one sample, and what follows from them alone is computed here, operation by operation:

    Conv(x, 0, b) -> SiLU -> Conv(., w, c)          one constant [1, C, H, W]
    Conv(x, 0, b) -> Add(h)                         Add(h, [1, C, 1, 1])

A product with zeros is zero, too (the gates of an untrained transformer), and a sum with zeros is the other summand.
Where a reader needs the batch (a Concat, a Reshape, an operation that is not listed), an Expand gives the constant the
batch of what the layer reads; with an open height or width the reader stays as it is. Constants of over a megabyte are
not computed. A layer that would make an output of the graph constant keeps its zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from .constant_folding import FOLDED_OUTPUT_BYTES
from .nodes import (
    Builder,
    Names,
    consumers,
    is_constant,
    is_op,
    known_ints,
    name_of,
    numpy_of,
    remove_dead,
    replace_value,
)

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operations on one sample of a batch: each element of the output depends on the same element of the inputs.
POINTWISE = (
    *("Sigmoid", "Relu", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Neg", "Abs", "Softplus", "LeakyRelu", "Elu", "Gelu"),
    *("HardSigmoid", "HardSwish", "Clip", "Reciprocal", "Sin", "Cos", "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max"),
)
# Operations on whole feature maps, one sample at a time.
SPATIAL = (
    *("Conv", "Gemm", "MatMul", "GroupNormalization", "InstanceNormalization", "LayerNormalization"),
    *("AveragePool", "MaxPool", "GlobalAveragePool"),
)

Constants = dict[ir.Value, npt.NDArray[Any]]
"""Values that are equal for all samples, as arrays of batch 1 that broadcast to the value's shape."""


def fold_dead_layers(model: ir.Model) -> int:
    """Replace layers with zero weights, and what follows from them, by constants; return the number of layers."""
    graph, count = model.graph, 0
    for node in list(graph):
        if node.graph is graph and _is_dead(node):
            count += _fold(model, node)
    if count:
        remove_dead(graph)
    return count


def _is_dead(node: ir.Node) -> bool:
    if not is_op(node, *LAYERS) or not is_constant(node.inputs[1]) or is_constant(node.inputs[0]):
        return False
    weight = node.inputs[1]
    if weight is None or weight.dtype != ir.DataType.FLOAT or node.outputs[0].shape is None:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if "transA" in node.attributes and node.attributes["transA"].as_int():
        return False
    rows = numpy_of(weight)
    return bool(rows.size) and not rows[:1].any() and not rows.any() and (bias is None or is_constant(bias))


def _bias_of(node: ir.Node, rank: int) -> npt.NDArray[np.float32] | None:
    """Return what the layer returns, with batch 1 and the rank of its output, or None where it differs by sample."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return np.zeros([1] * rank, np.float32)
    values = numpy_of(bias).astype(np.float32)
    if is_op(node, "Gemm"):
        values = values * np.float32(node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0)
        values = values.reshape([1] * (rank - values.ndim) + list(values.shape))
        return values if values.shape[0] == 1 else None
    return values.reshape([1, -1, *[1] * (rank - 2)])


def _fold(model: ir.Model, layer: ir.Node) -> bool:
    """Fold one layer and its followers; return whether that was possible."""
    graph, out = model.graph, layer.outputs[0]
    first = _bias_of(layer, len(out.shape or ()))
    if first is None:
        return False
    known = _followers(model, {out: first})
    if any(v.is_graph_output() or any(node.graph is not graph for node in consumers(v)) for v in known):
        return False
    names = Names(graph)
    for value, array in known.items():
        constants: dict[bool, ir.Value | None] = {}
        for node in consumers(value):
            if all(v in known for v in node.outputs):
                continue
            bare = _broadcasts(node, value)
            if bare and not array.any() and (is_op(node, "Add") or (is_op(node, "Sub") and node.inputs[1] is value)):
                other = node.inputs[0] if node.inputs[1] is value else node.inputs[1]
                if other is not None and not node.outputs[0].is_graph_output():
                    replace_value(node.outputs[0], other)
                    continue
            if bare not in constants:
                build = Builder(graph, names, before=layer)
                stem = f"{name_of(value)}_constant"
                constants[bare] = build.constant(stem, array) if bare else _expanded(build, layer, value, array)
            constant = constants[bare]
            for i, v in enumerate(node.inputs):
                if v is value and constant is not None:
                    node.replace_input_with(i, constant)
    return True


def _followers(model: ir.Model, known: Constants) -> Constants:
    """Return the constants with all values that follow from them and other constants alone."""
    waiting = list(known)
    while waiting:
        for node in consumers(waiting.pop(0)):
            if node.outputs[0] in known or not is_op(node, *POINTWISE, *SPATIAL) or len(node.outputs) != 1:
                continue
            zeros = is_op(node, "Mul") and any(v in known and not known[v].any() for v in node.inputs if v is not None)
            if zeros and node.outputs[0].shape is not None:
                known[node.outputs[0]] = np.zeros([1] * len(_shape(node)), np.float32)
                waiting.append(node.outputs[0])
                continue
            arrays = _inputs(node, known)
            result = None if arrays is None else _computed(model, node, arrays)
            if result is not None:
                known[node.outputs[0]] = result
                waiting.append(node.outputs[0])
    return known


def _inputs(node: ir.Node, known: Constants) -> dict[str, npt.NDArray[Any]] | None:
    """Return the inputs of a node for one sample, or None if one is not constant or needs an open size."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for value in node.inputs:
        if value is None:
            continue
        if value not in known and not is_constant(value):
            return None
        array = known[value] if value in known else numpy_of(value)
        if value in known and is_op(node, *SPATIAL):
            sizes = known_ints(value.shape, range(1, array.ndim))
            if sizes is None or 4 * int(np.prod(sizes)) > FOLDED_OUTPUT_BYTES:
                return None
            array = np.broadcast_to(array, [1, *sizes])
        full = value not in known and is_op(node, *POINTWISE) and array.ndim >= len(_shape(node)) > 0
        if full and array.shape[0] != 1:
            return None  # one constant for each sample of a fixed batch
        arrays[name_of(value)] = array
    return arrays


def _shape(node: ir.Node) -> tuple[Any, ...]:
    return () if node.outputs[0].shape is None else tuple(node.outputs[0].shape)


def _computed(model: ir.Model, node: ir.Node, arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
    """Return a node's output for one sample by ONNX's reference implementation, or None where that has none."""
    sizes = known_ints(node.outputs[0].shape, range(1, len(_shape(node))))
    if not _shape(node) or (is_op(node, *SPATIAL) and (sizes is None or 4 * np.prod(sizes) > FOLDED_OUTPUT_BYTES)):
        return None
    proto = ir.to_proto(node)
    inputs = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in arrays.items()
    ]
    out = onnx.helper.make_tensor_value_info(name_of(node.outputs[0]), onnx.TensorProto.FLOAT, None)
    opsets = [onnx.helper.make_opsetid("", model.opset_imports.get("", 21))]
    try:
        one = onnx.helper.make_model(onnx.helper.make_graph([proto], "one", inputs, [out]), opset_imports=opsets)
        result = np.asarray(next(iter(ReferenceEvaluator(one).run(None, dict(arrays)))))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # an operation, or a form of it, that the reference implementation lacks: the layer stays
    one_sample = result.dtype == np.float32 and result.ndim == len(_shape(node)) and result.shape[:1] == (1,)
    return result if one_sample and bool(np.isfinite(result).all()) else None


def _broadcasts(node: ir.Node, value: ir.Value) -> bool:
    """Return whether a node computes the same from a constant of batch 1: another input has the output's shape."""
    if not is_op(node, "Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
        return False
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    shape = node.outputs[0].shape
    named = shape is not None and all(isinstance(d, int) or d.value is not None for d in shape)
    return other is not value and other is not None and named and other.shape == shape


def _expanded(build: Builder, layer: ir.Node, value: ir.Value, array: npt.NDArray[Any]) -> ir.Value | None:
    """Write a constant with the batch of what the layer reads, or return None for an open height or width."""
    stem, int64 = name_of(value), ir.DataType.INT64
    sizes = known_ints(value.shape, range(1, array.ndim))
    if sizes is None:
        return None
    constant = build.constant(f"{stem}_constant", array)
    one = {"start": 0, "end": 1}
    batch = build.op("Shape", [layer.inputs[0]], f"{stem}_batch", dtype=int64, shape=[1], attributes=one)
    rest = build.constant(f"{stem}_sizes", np.array(sizes, np.int64))
    shape = build.op("Concat", [batch, rest], f"{stem}_shape", dtype=int64, shape=[array.ndim], attributes={"axis": 0})
    return build.op("Expand", [constant, shape], f"{stem}_expanded", like=value)
