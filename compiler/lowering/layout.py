"""Layouts: edits that keep onnxruntime's layout optimizer off integers, and allow it for float convolutions.

hide_ranks. The optimizer turns every integer convolution into a channels-last one between two Transposes, and then
moves those through the graph: some end up around float tensors with a second QuantizeLinear and DequantizeLinear,
others upstream of a Resize, whose channels-last form is five times slower. Without the Transposes, the kernel
transposes each image while it is in the cache. Measured on the digits, batch 16, two threads: 60.5 ms a call, not 64.5.

The optimizer skips a convolution if the rank of its input is unknown. So a Reshape that changes nothing stands in front
of each. Its shape is

    Slice(zeros(rank), start=0, end=row + rank)

and 0 in a Reshape's shape keeps that dimension. `zeros(rank)` has only `rank` elements, so the slice has `rank` zeros
for every row >= 0. `row`, the row index of a table, depends on the timestep, so onnxruntime cannot compute the slice,
or its length, when it builds the graph.

transpose_integers. A Transpose behind a DequantizeLinear goes in front of it, where it moves bytes. onnxruntime does
that too, by a QuantizeLinear and a DequantizeLinear behind the Transpose; but where each channel has its own scale,
nothing removes these, and quantizing along the last dimension takes 24 ns an element. The Stable Diffusion 1.5
configuration, whose attention reads transposed convolutions, takes 3.79 s a call instead of 4.11 (64x64 latents, batch
2, two threads).

split_biases. A float convolution (an island) becomes a blocked one only if its bias is constant; with a row of a table
as its bias it takes 5.7 ms instead of 3.1 (64 channels at 32x32). So an Add behind it takes over fold_time's bias.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph.nodes import Builder, Names, consumers, is_op, name_of, replace_value
from ..graph.ops import time_table
from ..graph.require import producer


def hide_ranks(graph: ir.Graph, convs: list[ir.Node]) -> None:
    """Put a Reshape in front of each convolution. Without a table there is no row index, and nothing is changed."""
    names, row = Names(graph), _row_index(graph)
    if row is None:
        return
    build = Builder(graph, names, after=producer(row))
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


def transpose_integers(graph: ir.Graph) -> None:
    """Rewrite Transpose(DQ(q)) as DQ(Transpose(q)), where nothing else reads the DQ."""
    names = Names(graph)
    for node in [node for node in graph if is_op(node, "Transpose")]:
        x, out = node.inputs[0], node.outputs[0]
        dequantize = None if x is None else x.producer()
        if x is None or dequantize is None or not is_op(dequantize, "DequantizeLinear"):
            continue
        integers, scale = dequantize.inputs[:2]
        if integers is None or scale is None or scale.shape is None or "perm" not in node.attributes:
            continue
        if x.is_graph_output() or len(consumers(x)) != 1:
            continue
        order = list(node.attributes["perm"].as_ints())
        build = Builder(graph, names, node)
        stem, perm = name_of(out), {"perm": order}
        turned = build.op(
            "Transpose", [integers], f"{stem}_integers", dtype=integers.dtype, shape=out.shape, attributes=perm
        )
        channel = dequantize.attributes["axis"].as_int() if "axis" in dequantize.attributes else 1
        axis = {"axis": order.index(channel % len(order))} if len(scale.shape) else {}
        given = [turned, *dequantize.inputs[1:]]
        replace_value(out, build.op("DequantizeLinear", given, f"{stem}_floats", like=out, attributes=axis))
        graph.remove(node, safe=True)
        graph.remove(dequantize, safe=True)


def split_biases(graph: ir.Graph) -> None:
    """Rewrite Conv(x, w, row of a table) as Conv(x, w) + row for convolutions in float."""
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
    """Write zeros(rank)[0 : row + rank] (see the module's docstring)."""
    stem = f"rank_{rank}"
    zeros, first = build.constant(f"{stem}_zeros", np.zeros(rank, np.int64)), build.constant(f"{stem}_first", [0])
    end = build.op("Add", [row, build.constant(stem, [rank])], f"{stem}_end", like=row)
    return build.op("Slice", [zeros, first, end], f"{stem}_shape", dtype=ir.DataType.INT64, shape=[None])


def _row_index(graph: ir.Graph) -> ir.Value | None:
    """Return the row index `[1]` of a table, which a Reshape makes the scalar index of a Gather, or None.

    compiler/scales/timetable.py writes them. The index of a class embedding has one element for each sample.
    """
    for node in graph:
        row = node.inputs[0] if is_op(node, "Reshape") else None
        if row is None or row.producer() is None or row.dtype != ir.DataType.INT64 or list(row.shape or ()) != [1]:
            continue
        out = node.outputs[0]
        if any(is_op(reader, "Gather") and reader.inputs[1] is out for reader in consumers(out)):
            return row
    return None
