"""Layouts: what keeps onnxruntime's optimizer away from integer convolutions, and what lets it at float ones.

hide_ranks. The optimizer turns every integer convolution into a channels-last one between two Transposes, and then
moves those through the graph: some end up around float tensors with a second QuantizeLinear and DequantizeLinear,
others upstream of a Resize, whose channels-last form is five times slower. Left alone, the kernel turns each image
around by itself while it is in the cache. Measured on the digits, batch 16, two threads: 60.5 ms a call, not 64.5.

It leaves a convolution alone whose input's rank it does not know. So a Reshape to the very same shape stands in front
of each, which moves nothing, with a shape that onnxruntime cannot compute in advance: as many zeros ("as it is") as the
row index of a table plus the rank, of `rank` zeros that there are.

split_biases. A float convolution (an island) becomes a blocked one only where its bias is constant; with one that is a
row of a table it takes 5.7 ms instead of 3.1 (64 channels at 32x32). So what fold_time put in is added behind it again.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph.nodes import Builder, Names, consumers, is_op, name_of
from ..graph.ops import time_table


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


def split_biases(graph: ir.Graph) -> None:
    """Conv(x, w, row of a table) -> Conv(x, w) + row, for the convolutions that stayed in float."""
    names = Names(graph)
    for conv in [node for node in graph if is_op(node, "Conv") and len(node.inputs) > 2]:
        bias, out = conv.inputs[2], conv.outputs[0]
        if bias is None or time_table(bias) is None or out.shape is None:
            continue
        readers = [(use.node, use.idx) for use in out.uses()]
        conv.resize_inputs(2)
        build = Builder(graph, names, after=conv)
        column = build.constant(f"{name_of(out)}_column", [1, -1, *[1] * (len(out.shape) - 2)])
        shape = [1, bias.shape[0] if bias.shape else None, *[1] * (len(out.shape) - 2)]
        row = build.op("Reshape", [bias, column], f"{name_of(out)}_bias_column", like=bias, shape=shape)
        added = build.op("Add", [out, row], f"{name_of(out)}_biased", like=out)
        for node, index in readers:
            node.replace_input_with(index, added)
        if out.is_graph_output():
            name = name_of(out)
            out.name = names.unique(f"{name}_unbiased")
            graph.outputs[list(graph.outputs).index(out)] = added
            added.name = name


def _same_shape(build: Builder, row: ir.Value, rank: int) -> ir.Value:
    stem = f"rank_{rank}"
    zeros, first = build.constant(f"{stem}_zeros", np.zeros(rank, np.int64)), build.constant(f"{stem}_first", [0])
    end = build.op("Add", [row, build.constant(stem, [rank])], f"{stem}_end", like=row)
    return build.op("Slice", [zeros, first, end], f"{stem}_shape", dtype=ir.DataType.INT64, shape=[None])


def _row_index(graph: ir.Graph) -> ir.Value | None:
    """The row index `[1]` of a table: what is turned into the scalar that Gather wants (compiler/scales/timetable.py).

    An embedding of a class label may look alike, but has a row for each sample.
    """
    for node in graph:
        row = node.inputs[0] if is_op(node, "Reshape") else None
        if row is None or row.producer() is None or row.dtype != ir.DataType.INT64 or list(row.shape or ()) != [1]:
            continue
        out = node.outputs[0]
        if any(is_op(reader, "Gather") and reader.inputs[1] is out for reader in consumers(out)):
            return row
    return None
