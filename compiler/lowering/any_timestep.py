"""The written file takes its timestep as a number, as `[1]` and as `[batch]`.

The timestep is declared without dimensions, which onnxruntime checks for no call: it refuses other ranks only where the
declared one is not 0. Programs that read the declaration give a number; pipelines that always give `[1]` or `[batch]`
run too. The first nodes make of it what the graph was written for, because shapes inferred from the declaration are
those of one number.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mezzotint.runtime.signature import Signature

from ..graph.nodes import Builder, Names, consumers, is_constant, is_op, name_of, numpy_of, replace_use

_SCOPE = "timestep"


def take_any_timestep(model: ir.Model, signature: Signature) -> ir.Model:
    """Return a clone whose timestep input is declared without dimensions, and which computes the same for all forms.

    A graph that had `[batch]` gets a value for each sample, repeated where one is given; one that had `[]` or `[1]`
    gets the first.
    """
    clone = model.clone()
    graph = clone.graph
    timestep = next(v for v in graph.inputs if name_of(v) == signature.timestep)
    rank = None if timestep.shape is None else len(timestep.shape)
    readers = [node for node in consumers(timestep) if not _takes_first(node)]
    if readers and rank in (0, 1):
        build = Builder(graph, Names(graph), graph[0], scope=_SCOPE)
        whole = _first(build, timestep, rank) if rank == 0 or list(timestep.shape or ()) == [1] else None
        whole = _for_each(build, timestep, signature) if whole is None else whole
        for node in readers:
            replace_use(node, timestep, whole)
    if rank in (0, 1):
        timestep.shape = ir.Shape([])
    return clone


def _takes_first(node: ir.Node) -> bool:
    """Return whether a node flattens the timestep for nodes that take its first element, as the lookups of rows do."""
    if not is_op(node, "Reshape") or not is_constant(node.inputs[1]) or node.outputs[0].is_graph_output():
        return False
    shape = node.inputs[1]
    if shape is None or numpy_of(shape).tolist() != [-1]:
        return False
    return all(_is_first(reader) for reader in consumers(node.outputs[0]))


def _is_first(node: ir.Node) -> bool:
    index = node.inputs[1] if len(node.inputs) == 2 else None
    return is_op(node, "Gather") and is_constant(index) and index is not None and not numpy_of(index).any()


def _flat(build: Builder, timestep: ir.Value) -> ir.Value:
    shape = build.constant("timestep_flat_shape", np.array([-1]))
    return build.op("Reshape", [timestep, shape], "timestep_flat", dtype=timestep.dtype, shape=[None])


def _first(build: Builder, timestep: ir.Value, rank: int) -> ir.Value:
    """Return the first timestep, `[1]` or a scalar."""
    index = build.constant("timestep_first", np.array(0 if rank == 0 else [0], np.int64))
    shape: list[int] = [] if rank == 0 else [1]
    value = _flat(build, timestep)
    return build.op("Gather", [value, index], "timestep_one", dtype=timestep.dtype, shape=shape, attributes={"axis": 0})


def _for_each(build: Builder, timestep: ir.Value, signature: Signature) -> ir.Value:
    """Return a timestep for each sample, `[batch]`."""
    sample = next(v for v in build.graph.inputs if name_of(v) == signature.sample)
    int64 = ir.DataType.INT64
    sizes = build.op("Shape", [sample], "timestep_sizes", dtype=int64, shape=[4])
    index = build.constant("timestep_axis", np.array([0]))
    batch = build.op("Gather", [sizes, index], "timestep_batch", dtype=int64, shape=[1], attributes={"axis": 0})
    shape = None if sample.shape is None else [sample.shape[0]]
    return build.op(
        "Expand", [_flat(build, timestep), batch], "timestep_each", dtype=timestep.dtype, shape=shape or [None]
    )
