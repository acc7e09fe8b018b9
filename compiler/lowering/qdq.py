"""Lowering `qdq`: the portable form, standard QuantizeLinear and DequantizeLinear with constant parameters.

The graph of insert_qdq quantizes float weights and leaves biases in float. onnxruntime's CPU provider fuses a group
only when the weight is an integer constant behind a DequantizeLinear, and the bias an int32 constant behind one whose
scale is exactly x_scale * w_scale[c], with zero point 0. This lowering writes that form. Apart from the rounding of
biases, values do not change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..core.formats import along
from ..errors import PassError
from ..graph.nodes import Builder, Names, consumers, initializer, is_constant, is_op, name_of, numpy_of, remove_dead
from ..graph.ops import MOVERS
from ..graph.require import dtype_of, inputs

INT32_LIMIT = 2**31 - 1


def lower_qdq(model: ir.Model) -> ir.Model:
    """Return a lowered clone of a model that insert_qdq wrote. The model itself is not changed."""
    lowered = model.clone()
    names = Names(lowered.graph)
    fold_weights(lowered.graph)
    for node in list(lowered.graph):
        if is_op(node, "Conv", "Gemm") and len(node.inputs) > 2:
            _lower_bias(lowered.graph, names, node, node, 2)
        elif is_op(node, "MatMul"):
            readers = consumers(node.outputs[0])
            if len(readers) == 1 and is_op(readers[0], "Add") and not node.outputs[0].is_graph_output():
                _lower_bias(lowered.graph, names, node, readers[0], 0 if is_constant(readers[0].inputs[0]) else 1)
    remove_dead(lowered.graph)
    return lowered


def fold_weights(graph: ir.Graph) -> None:
    """Replace every quantized constant by its integers."""
    for node in list(graph):
        if is_op(node, "QuantizeLinear") and is_constant(node.inputs[0]):
            _fold_weight(graph, node)


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """Return the DequantizeLinear that computes a value, or None."""
    node = None if value is None else value.producer()
    return node if is_op(node, "DequantizeLinear") else None


def quantizer_chain(value: ir.Value | None) -> tuple[ir.Node, ...]:
    """Return the nodes from the one that computes a value on a grid back to its QuantizeLinear, () for other values.

    Between the two are the DequantizeLinear, the Clip of a narrow format, and nodes that move integers (clean_qdq).
    """
    chain: list[ir.Node] = []
    node = None if value is None else value.producer()
    while node is not None and is_op(node, "QuantizeLinear", "DequantizeLinear", "Clip", *MOVERS):
        chain.append(node)
        if is_op(node, "QuantizeLinear"):
            return tuple(chain)
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return ()


def clip_behind(quantize_node: ir.Node) -> ir.Node | None:
    """Return the Clip that keeps integers of a format of fewer than 8 bits inside its grid, or None."""
    readers = consumers(quantize_node.outputs[0])
    return readers[0] if len(readers) == 1 and is_op(readers[0], "Clip") else None


def grid_ends(quantize_node: ir.Node) -> tuple[int, int]:
    """Return the lowest and the highest integer that a QuantizeLinear, with the Clip behind it, can write."""
    clip, zero = clip_behind(quantize_node), inputs(quantize_node, 3)[2]
    if clip is None:
        limits = np.iinfo(dtype_of(zero).numpy())
        return int(limits.min), int(limits.max)
    lowest, highest = (int(numpy_of(v)) for v in clip.inputs[1:] if v is not None)
    return lowest, highest


def middle_of(zero: ir.Value) -> npt.NDArray[Any]:
    """Return the zero point that a kernel gets in place of one for each channel; the bias corrects for it."""
    limits = np.iinfo(zero.dtype.numpy() if zero.dtype is not None else np.dtype(np.uint8))
    return np.array((int(limits.min) + int(limits.max) + 1) // 2, limits.dtype)


def check_int32(integers: npt.NDArray[Any], layer: ir.Node) -> None:
    """Raise PassError for a bias that does not fit into int32: a clamped or a wrapped one would be wrong."""
    if not np.all(np.abs(integers) <= INT32_LIMIT):
        raise PassError(
            f"the bias does not fit into int32: it would be {np.abs(integers).max():.3g}",
            where=f"{layer.op_type} {layer.name!r}",
            hint="keep the layer in float (insert_qdq.islands)",
        )


def _fold_weight(graph: ir.Graph, quantize_node: ir.Node) -> None:
    """Replace QuantizeLinear(constant), and the Clip of a narrow format behind it, by integers, row by row."""
    weight, scale, zero = inputs(quantize_node, 3)
    x, s, z = numpy_of(weight), numpy_of(scale), numpy_of(zero)
    axis = quantize_node.attributes["axis"].as_int() if "axis" in quantize_node.attributes and s.ndim else None
    clip = clip_behind(quantize_node)
    lowest, highest = grid_ends(quantize_node)
    integers = np.empty(x.shape, z.dtype)
    for i in range(len(x)):
        # A slice keeps its axis, of length 1, so per-channel parameters along axis 0 are cut the same way.
        cut = slice(i, i + 1)
        s_i, z_i = (s[cut], z[cut]) if axis == 0 else (s, z)
        q = np.rint(x[cut] / along(s_i, axis, x.ndim)) + along(z_i, axis, x.ndim).astype(np.float32)
        integers[cut] = np.clip(q, lowest, highest).astype(z.dtype)
    last = clip or quantize_node
    name = name_of(last.outputs[0])
    last.outputs[0].name = f"{name}_folded"
    last.outputs[0].replace_all_uses_with(initializer(graph, name, ir.tensor(integers, name=name)))
    graph.remove(last, safe=True)
    if clip is not None:
        graph.remove(quantize_node, safe=True)


def _lower_bias(graph: ir.Graph, names: Names, layer: ir.Node, holder: ir.Node, index: int) -> None:
    """Write the float bias of an integer layer as int32 with scale x_scale * w_scale; no zero point means 0."""
    bias = holder.inputs[index]
    x, w = dequantizer(layer.inputs[0]), dequantizer(layer.inputs[1])
    if bias is None or not is_constant(bias) or x is None or w is None:
        return
    x_scale, w_scale = x.inputs[1], w.inputs[1]
    if x_scale is None or w_scale is None or not is_constant(x_scale) or not is_constant(w_scale):
        return
    values = numpy_of(bias)
    scale = (numpy_of(x_scale).astype(np.float32) * numpy_of(w_scale).astype(np.float32)).reshape(-1)
    if values.ndim != 1 or scale.size not in (1, values.size) or not is_constant(w.inputs[0]):
        return  # no bias of one number for each channel, such as a mask over attention scores: no kernel takes it
    scale = np.broadcast_to(scale, values.shape).astype(np.float32)
    integers = np.rint(values.astype(np.float64) / scale)
    check_int32(integers, layer)
    build = Builder(graph, names, holder)
    stem = name_of(bias)
    holder.replace_input_with(
        index,
        build.op(
            "DequantizeLinear",
            [
                build.constant(f"{stem}_int32", integers.astype(np.int32)),
                build.constant(f"{stem}_scale", scale),
            ],
            f"{stem}_dequantized",
            like=bias,
            attributes={"axis": 0},
        ),
    )
