"""The pairs QuantizeLinear and DequantizeLinear of a graph, and the values between the two.

The torch module computes no integers: the module of a QuantizeLinear returns the values of the grid, and the
DequantizeLinear of the same scale, behind nodes that only move them, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ..errors import PassError
from ..graph.nodes import is_op
from ..graph.ops import is_mover
from ..graph.require import inputs
from ..lowering.qdq import grid_ends
from ..scales.timetable import rows_and_index
from .quantizers import Quantizer


@dataclass(frozen=True, eq=False)
class _Parameters:
    """Scale and zero point, `[1]` or `[rows]`, per channel `[1, C]` or `[rows, C]`, and the index of the row."""

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.integer]
    row: ir.Value | None

    def same_as(self, other: _Parameters) -> bool:
        return (
            self.row is other.row
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


class Pairs:
    """The integers of a graph, each with the parameters of the QuantizeLinear that made it."""

    def __init__(self) -> None:
        self._of: dict[ir.Value, _Parameters] = {}
        self._modules: dict[tuple[object, ...], Quantizer] = {}

    def __contains__(self, value: ir.Value | None) -> bool:
        return value in self._of

    def open(self, node: ir.Node) -> tuple[Quantizer, ir.Value | None]:
        """Return the module of a QuantizeLinear and its index of the row. Nodes with the same constants share one."""
        _, scale, zero = inputs(node, 3)
        parameters = _parameters(node)
        self._of[node.outputs[0]] = parameters
        channels = parameters.scale.ndim > 1
        axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 1) if channels else None
        key = (scale, zero, axis, *grid_ends(node))
        if key not in self._modules:
            rows = parameters.row is not None
            scales, zeros = (
                torch.from_numpy(np.array(part if rows else part[0]))
                for part in (parameters.scale, parameters.zero_point)
            )
            self._modules[key] = Quantizer(scales, zeros, *grid_ends(node), axis, rows)
        return self._modules[key], parameters.row

    def passes(self, node: ir.Node) -> bool:
        """Return whether a node changes no value of the torch module: the Clip of a narrow format, and the second of a
        pair."""
        source = node.inputs[0] if node.inputs else None
        if source is None or source not in self._of:
            return False
        if is_op(node, "Clip"):
            self._of[node.outputs[0]] = self._of[source]
            return True
        if is_op(node, "DequantizeLinear"):
            if not self._of[source].same_as(_parameters(node)):
                raise PassError(
                    "a DequantizeLinear has other parameters than the QuantizeLinear in front of it",
                    where=f"DequantizeLinear {node.name!r}",
                )
            return True
        return False

    def move(self, node: ir.Node) -> None:
        """Mark the outputs of a node that moves integers. Raise PassError for one that computes with them."""
        read = [self._of[value] for value in node.inputs if value is not None and value in self._of]
        if not read or is_op(node, "Shape", "Size"):
            return
        joined = is_op(node, "Concat") and len(read) == len(node.inputs) and all(p.same_as(read[0]) for p in read)
        if not (joined or is_mover(node) or is_op(node, "Identity", "MaxPool", "Expand", "Slice", "Gather", "Split")):
            raise PassError(
                f"{node.op_type} computes with integers, which the torch module does not have",
                where=f"{node.op_type} {node.name!r}",
                hint="convert the graph before it is lowered",
            )
        self._of |= dict.fromkeys(node.outputs, read[0])


def _parameters(node: ir.Node) -> _Parameters:
    _, scale, zero = inputs(node, 3)
    (scales, row), (zeros, _) = rows_and_index(scale), rows_and_index(zero)
    return _Parameters(scales, zeros, row)
