"""Keeps onnxruntime's layout optimizer away from integer convolutions.

It turns every integer convolution into a channels-last one between two Transposes, and then moves those through the
graph: some end up around float tensors with a second QuantizeLinear and DequantizeLinear, others upstream of a Resize,
whose channels-last form is five times slower. Left alone, the kernel turns each image around by itself while it is in
the cache. Measured on the digits, batch 16, two threads: 60.5 ms a call instead of 64.5.

The optimizer leaves a convolution alone whose input's rank it does not know. So a Reshape to the very same shape stands
in front of each, which moves nothing, with a shape that onnxruntime cannot compute in advance: as many zeros ("as it
is") as the row index of a table plus the rank, of `rank` zeros that there are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import Builder, Names, consumers, is_op


def hide_ranks(graph: ir.Graph, convs: list[ir.Node]) -> None:
    """Put a Reshape in front of each convolution; nothing where no table gives a number that is found at run time."""
    names, row = Names(graph), _row_index(graph)
    if row is None:
        return
    producer = row.producer()
    assert producer is not None
    build = Builder(graph, names, after=producer)
    shapes: dict[int, ir.Value] = {}
    for conv in convs:
        x = conv.inputs[0]
        if x is None or x.shape is None:
            continue
        rank = len(x.shape)
        if rank not in shapes:
            shapes[rank] = _same_shape(build, row, rank)
        # No `like`: the shape has to stay unknown in the file, too.
        hidden = Builder(graph, names, conv).op("Reshape", [x, shapes[rank]], f"{conv.name}_input", dtype=x.dtype)
        conv.replace_input_with(0, hidden)


def _same_shape(build: Builder, row: ir.Value, rank: int) -> ir.Value:
    stem = f"rank_{rank}"
    zeros, first = build.constant(f"{stem}_zeros", np.zeros(rank, np.int64)), build.constant(f"{stem}_first", [0])
    end = build.op("Add", [row, build.constant(stem, [rank])], f"{stem}_end", like=row)
    return build.op("Slice", [zeros, first, end], f"{stem}_shape", dtype=ir.DataType.INT64, shape=[None])


def _row_index(graph: ir.Graph) -> ir.Value | None:
    """The row index `[1]` of a table: what is turned into the scalar that Gather wants."""
    for node in graph:
        readers = consumers(node.outputs[0]) if is_op(node, "Reshape") else []
        if any(is_op(reader, "Gather") and reader.inputs[1] is node.outputs[0] for reader in readers):
            return node.inputs[0]
    return None
