"""The scales and zero points with which a layer of a lowered graph quantizes its input and its output is read.

Integers are written by one node and read by another, past Clips (formats of fewer than 8 bits) and nodes that only move
data. The parameters of both ends are read from the file: if they differ, the file computes wrong numbers, and a copy of
the layer has to compute the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..graph.nodes import consumers, is_constant, is_op, numpy_of
from ..graph.ops import is_mover
from ..graph.require import dtype_of, inputs, tensor_of

LOWERED_LAYERS = ("QLinearConv", "MatMulIntegerToFloat")


class UnknownForm(Exception):
    """A layer is written in a form that this module cannot read; the message says which."""


def is_quantized(node: ir.Node) -> bool:
    """Return whether a node of a lowered graph is an integer operation, or reads a DequantizeLinear."""
    return node.op_type in LOWERED_LAYERS or any(_dequantizer(v) for v in node.inputs[:2])


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = above(value)
    return node if is_op(node, "DequantizeLinear") else None


def above(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes a value, past nodes that only move data; None for a constant or graph input."""
    node = None if value is None else value.producer()
    while node is not None and is_mover(node):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node


@dataclass(frozen=True, eq=False)
class LoweredGrid:
    """The quantization of one activation: values of the lowered graph that integers are written and read with."""

    scale: ir.Value | None
    zero: ir.Value | None
    clip: ir.Node | None
    axis: int | None
    read_scale: ir.Value | None
    read_zero: ir.Value | None


def axis_of(grid: LoweredGrid) -> dict[str, int]:
    """Return the attributes of a quantizer with this grid: its axis, if the grid has one scale for each channel."""
    return {} if grid.axis is None else {"axis": grid.axis}


def input_grid(node: ir.Node, index: int) -> LoweredGrid | None:
    """Return the grid of a node's input, or None for a float input.

    If another layer's kernel writes the integers, writing and reading have the parameters of reading. Raises
    UnknownForm.
    """
    if node.op_type == "QLinearConv":
        reading, writer = node.inputs[1:3], above(node.inputs[0])
    elif node.op_type == "MatMulIntegerToFloat":
        reading, writer = (node.inputs[2], node.inputs[4]), above(node.inputs[0])
    else:
        dequantizer = _dequantizer(node.inputs[index])
        if dequantizer is None:
            return None
        reading, writer = dequantizer.inputs[1:3], above(dequantizer.inputs[0])
    read_scale, read_zero = reading
    clip = writer if is_op(writer, "Clip") else None
    if clip is not None:
        writer = above(clip.inputs[0])
    scale, zero = read_scale, read_zero
    if writer is not None and is_op(writer, "QuantizeLinear"):
        scale, zero = writer.inputs[1:3]
        if _is_rescaled(writer):
            raise UnknownForm("its input is multiplied by a factor of the timestep in front of a constant scale")
    if any(v is not None and list(v.shape or ()) not in ([], [1]) for v in (scale, read_scale)):
        raise UnknownForm("its input has a scale for each channel")
    return LoweredGrid(scale, zero, clip, None, read_scale, read_zero)


def _is_rescaled(quantize: ir.Node) -> bool:
    """Return whether a QuantizeLinear reads the product with a row of numbers (compiler/lowering/constant.py)."""
    product = None if quantize.inputs[0] is None else quantize.inputs[0].producer()
    if product is None or not is_op(product, "Mul") or product.inputs[1] is None:
        return False
    node = product.inputs[1].producer()
    if node is not None and is_op(node, "Split"):
        sizes = node.inputs[1] if len(node.inputs) > 1 else None
        if sizes is None or not is_constant(sizes) or np.any(numpy_of(sizes) != 1) or node.inputs[0] is None:
            return False
        node = node.inputs[0].producer()
    table = node.inputs[0] if node is not None and is_op(node, "Gather") else None
    one = is_op(product.inputs[1].producer(), "Split") or (table is not None and list(table.shape or ())[1:] == [1])
    return table is not None and is_constant(table) and one


def output_grid(node: ir.Node) -> LoweredGrid | None:
    """Return the grid of a node's output, or None where it stays float. Raises UnknownForm."""
    out = node.outputs[0]
    readers = consumers(out)
    scale: ir.Value | None
    if node.op_type == "QLinearConv":
        scale, zero = node.inputs[6:8]
    elif len(readers) == 1 and is_op(readers[0], "QuantizeLinear"):
        scale, zero = readers[0].inputs[1:3]
        out, readers = readers[0].outputs[0], consumers(readers[0].outputs[0])
    else:
        return None
    clip = readers[0] if len(readers) == 1 and is_op(readers[0], "Clip") else None
    read_scale, read_zero, axis = _reading(out if clip is None else clip.outputs[0], scale, zero)
    return LoweredGrid(scale, zero, clip, axis, read_scale, read_zero)


def _reading(
    out: ir.Value, scale: ir.Value | None, zero: ir.Value | None
) -> tuple[ir.Value | None, ir.Value | None, int | None]:
    """Return (scale, zero point, axis) of the first node that reads the integers, else `scale` and `zero`."""
    for reader in consumers(out):
        if is_op(reader, "DequantizeLinear"):
            channels = list(reader.inputs[1].shape or ()) not in ([], [1]) if reader.inputs[1] is not None else False
            axis = reader.attributes["axis"].as_int() if channels and "axis" in reader.attributes else 1
            return reader.inputs[1], reader.inputs[2], axis if channels else None
        if is_mover(reader) and reader.inputs[0] is out:
            reading = _reading(reader.outputs[0], scale, zero)
            if reading[2] is not None and reader.op_type != "Resize":
                raise UnknownForm("its output has a scale for each channel, and is moved")
            return reading
        if reader.op_type == "QLinearConv" and reader.inputs[0] is out:
            return reader.inputs[1], reader.inputs[2], None
        if reader.op_type == "MatMulIntegerToFloat" and reader.inputs[0] is out:
            return reader.inputs[2], reader.inputs[4], None
    return scale, zero, None


def steps_of(grid: LoweredGrid) -> int:
    """Return the number of steps of a grid: its highest integer minus its lowest."""
    if grid.clip is not None:
        _, low, high = inputs(grid.clip, 3)
        return int(tensor_of(high).numpy()) - int(tensor_of(low).numpy())
    limits = np.iinfo(dtype_of(grid.read_zero).numpy())
    return int(limits.max) - int(limits.min)
