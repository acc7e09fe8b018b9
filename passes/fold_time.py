"""fold_time: move additions that depend only on the timestep into the bias of the convolution before them.

    Conv(x, w, b) + table[row]  ->  Conv(x, w, (b + table)[row])

After freeze_time the time embedding of a ResBlock is such a table. An integer convolution with tables of scales gathers
a row of its int32 bias in any case, so the addition, one pass over the whole feature map, disappears from the graph.

The pass needs the lowering `integer` or `constant`: with `qdq` a convolution whose bias is not constant would stay in
float. A convolution that stays in float as an island gets its addition back at the end (compiler/lowering/layout.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import (
    Builder,
    Names,
    consumers,
    is_constant,
    is_op,
    name_of,
    numpy_of,
    remove_dead,
    replace_value,
)
from mezzotint.compiler.graph.require import inputs
from mezzotint.compiler.graph.topology import time_branch


@dataclass(frozen=True)
class FoldTime(GraphPass):
    """It has no options. Only convolutions whose output has no other reader are rewritten."""

    needs: ClassVar[frozenset[str]] = frozenset({"frozen"})
    tolerance: ClassVar[float | None] = 1e-4  # the bias is added in another order

    def run(self, program: Program, context: Context) -> Program:
        graph = program.graph
        names = Names(graph)
        timely = set(time_branch(graph, program.signature).values)
        folded = sum(_fold(graph, names, node, timely) for node in list(graph) if is_op(node, "Conv"))
        remove_dead(graph)
        return program.noted(f"{folded} additions moved into convolutions")


def _fold(graph: ir.Graph, names: Names, conv: ir.Node, timely: set[ir.Value]) -> bool:
    out = conv.outputs[0]
    readers = consumers(out)
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if out.is_graph_output() or len(readers) != 1 or not is_op(readers[0], "Add") or not is_constant(bias):
        return False
    add = readers[0]
    other = add.inputs[1] if add.inputs[0] is out else add.inputs[0]
    gather = None if other is None else other.producer()
    if gather is None or not is_op(gather, "Gather") or not is_constant(gather.inputs[0]):
        return False
    if gather.inputs[1] not in timely:
        return False  # rows of a class or a prompt differ within a batch, a bias does not
    (_, _, bias), (time_table, index) = inputs(conv, 3), inputs(gather, 2)
    values, table = numpy_of(bias), numpy_of(time_table)
    if table.ndim != len(out.shape or ()) or table[0].size != len(values) or table.shape[1] != len(values):
        return False  # the table does not lie along the channels
    build = Builder(graph, names, conv)
    stem = name_of(out)
    rows = build.constant(f"{stem}_bias_table", (table.reshape(len(table), -1) + values).astype(np.float32))
    row = build.op(
        "Gather",
        [rows, index],
        f"{stem}_bias_rows",
        dtype=bias.dtype,
        shape=[1, len(values)],
        attributes={"axis": 0},
    )
    flat = build.constant(f"{stem}_bias_shape", np.array([-1]))
    conv.replace_input_with(2, build.op("Reshape", [row, flat], f"{stem}_bias", dtype=bias.dtype, shape=[len(values)]))
    replace_value(add.outputs[0], out)
    graph.remove(add, safe=True)
    return True
