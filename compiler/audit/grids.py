"""How a layer of a lowered graph makes integers of its input and reads those of its output.

Integers are written by one node and read by another, past Clips (formats of fewer than 8 bits) and nodes that only move
data. Both ends are taken as they are in the file: where they disagree, what is computed is wrong, and shall be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..graph.nodes import consumers, is_op
from ..graph.ops import is_mover

INTEGER = ("QLinearConv", "MatMulIntegerToFloat")


class UnknownForm(Exception):
    """This group is written in a way that is not known here."""


def is_quantized(node: ir.Node) -> bool:
    return node.op_type in INTEGER or any(_dequantizer(v) for v in node.inputs[:2])


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = above(value)
    return node if is_op(node, "DequantizeLinear") else None


def above(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value, past those that only move data."""
    node = None if value is None else value.producer()
    while node is not None and is_mover(node):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node


@dataclass(frozen=True, eq=False)
class Grid:
    """How integers are made and read: parameters in the lowered graph, of writing and of reading."""

    scale: ir.Value | None
    zero: ir.Value | None
    clip: ir.Node | None
    axis: int | None
    read_scale: ir.Value | None
    read_zero: ir.Value | None


def axis_of(grid: Grid) -> dict[str, int]:
    return {} if grid.axis is None else {"axis": grid.axis}


def input_grid(node: ir.Node, index: int) -> Grid | None:
    """How a node's input comes to be integers; None for a float one. A layer before it may have made them: then they
    are written as this node reads them."""
    if node.op_type == "QLinearConv":
        read, made = node.inputs[1:3], above(node.inputs[0])
    elif node.op_type == "MatMulIntegerToFloat":
        read, made = (node.inputs[2], node.inputs[4]), above(node.inputs[0])
    else:
        dequantizer = _dequantizer(node.inputs[index])
        if dequantizer is None:
            return None
        read, made = dequantizer.inputs[1:3], above(dequantizer.inputs[0])
    read_scale, read_zero = read
    clip = made if is_op(made, "Clip") else None
    if clip is not None:
        made = above(clip.inputs[0])
    scale, zero = read_scale, read_zero
    if made is not None and is_op(made, "QuantizeLinear"):
        scale, zero = made.inputs[1:3]
    if any(v is not None and list(v.shape or ()) not in ([], [1]) for v in (scale, read_scale)):
        raise UnknownForm("its input has a scale for each channel")
    return Grid(scale, zero, clip, None, read_scale, read_zero)


def output_grid(node: ir.Node) -> Grid | None:
    """How a node's output becomes integers; None where it stays float."""
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
    return Grid(scale, zero, clip, axis, read_scale, read_zero)


def _reading(
    out: ir.Value, scale: ir.Value | None, zero: ir.Value | None
) -> tuple[ir.Value | None, ir.Value | None, int | None]:
    """(scale, zero point, axis) with which integers are read, by the first that reads them."""
    for reader in consumers(out):
        if is_op(reader, "DequantizeLinear"):
            channels = list(reader.inputs[1].shape or ()) not in ([], [1]) if reader.inputs[1] is not None else False
            axis = reader.attributes["axis"].as_int() if channels and "axis" in reader.attributes else 1
            return reader.inputs[1], reader.inputs[2], axis if channels else None
        if is_mover(reader) and reader.inputs[0] is out:
            found = _reading(reader.outputs[0], scale, zero)
            if found[2] is not None and reader.op_type != "Resize":
                raise UnknownForm("its output has a scale for each channel, and is moved")
            return found
        if reader.op_type == "QLinearConv" and reader.inputs[0] is out:
            return reader.inputs[1], reader.inputs[2], None
        if reader.op_type == "MatMulIntegerToFloat" and reader.inputs[0] is out:
            return reader.inputs[2], reader.inputs[4], None
    return scale, zero, None


def steps_of(grid: Grid) -> int:
    """The number of steps of a grid: its highest integer less its lowest."""
    if grid.clip is not None:
        low, high = (v.const_value for v in grid.clip.inputs[1:] if v is not None)
        assert low is not None and high is not None
        return int(high.numpy()) - int(low.numpy())
    assert grid.read_zero is not None and grid.read_zero.dtype is not None
    limits = np.iinfo(grid.read_zero.dtype.numpy())
    return int(limits.max) - int(limits.min)
