"""Half precision inside a graph is widened to float32, exactly: each half is a float32 number.

Converters to half precision that keep the ends in float32 put a Cast behind each input and in front of each output. The
CPU's integer kernels start from float32, and the passes recognise layers by float32 weights. What the widened graph
computes between its weights is more precise than what the half graph did.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ..graph.nodes import Builder, Names, consumers, name_of, replace_use

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TYPE_ATTRIBUTES = ("to", "dtype", "stash_type", "output_dtype")


def widen_halves(model: ir.Model) -> str | None:
    """Widen all half-precision weights and values in place; return the name of the first one, or None for none.

    Inputs and outputs of the graph keep their types, because whoever calls the model gives them: a Cast stands between.
    """
    first = next(_half_names(model), None)
    if first is None:
        return None
    _cast_ends(model.graph)
    ends = {*model.graph.inputs, *model.graph.outputs}
    for graph in _graphs(model):
        values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
        for value in values:
            if value.dtype in HALVES and value not in ends:
                value.type = ir.TensorType(ir.DataType.FLOAT)
        if not isinstance(graph, ir.Function):
            for value in graph.initializers.values():
                _widen_constant(value)
        for node in graph:
            if not any(value in ends for value in node.outputs):
                _widen_attributes(node)
    return first


def _graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """Yield the graph, the functions, and the graphs inside their nodes."""
    waiting: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while waiting:
        graph = waiting.pop(0)
        yield graph
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    waiting.append(attribute.as_graph())
                elif attribute.type == ir.AttributeType.GRAPHS:
                    waiting += attribute.as_graphs()


def _half_names(model: ir.Model) -> Iterator[str]:
    for graph in _graphs(model):
        if not isinstance(graph, ir.Function):
            yield from (name for name, value in graph.initializers.items() if _dtype(value) in HALVES)
        for node in graph:
            if any(_is_half(attribute) for attribute in node.attributes.values()):
                yield node.name or name_of(node.outputs[0])
            yield from (name_of(value) for value in node.outputs if value.dtype in HALVES)


def _dtype(value: ir.Value) -> ir.DataType | None:
    return value.dtype if value.const_value is None else value.const_value.dtype


def _is_half(attribute: ir.Attr) -> bool:
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().dtype in HALVES
    return attribute.name in _TYPE_ATTRIBUTES and attribute.value in HALVES


def _cast_ends(graph: ir.Graph) -> None:
    """Put a Cast behind each half input and in front of each half output, so that only these stay half."""
    names = Names(graph)
    for value in graph.inputs:
        readers = consumers(value)
        if value.dtype in HALVES and readers and name_of(value) not in graph.initializers:
            to = {"to": int(ir.DataType.FLOAT)}
            build = Builder(graph, names, next(iter(graph)))
            wide = build.op("Cast", [value], f"{name_of(value)}_wide", like=value, attributes=to)
            wide.type = ir.TensorType(ir.DataType.FLOAT)
            for node in readers:
                replace_use(node, value, wide)
    for i, value in enumerate(graph.outputs):
        producer = value.producer()
        if value.dtype not in HALVES or producer is None:
            continue
        name, value.name = name_of(value), names.unique(f"{name_of(value)}_wide")
        narrow = ir.Value(name=name, shape=value.shape, type=value.type)
        cast = ir.node("Cast", [value], {"to": int(value.dtype)}, outputs=[narrow], name=names.unique(f"{name}_narrow"))
        graph.insert_after(producer, cast)
        graph.outputs[i] = narrow


def _widen_constant(value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in HALVES:
        return
    value.const_value = _widened(tensor)
    value.type = ir.TensorType(ir.DataType.FLOAT)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return the tensor in float32, read from its file only when its numbers are wanted."""
    return ir.LazyTensor(
        lambda: ir.tensor(np.asarray(tensor.numpy()).astype(np.float32), name=tensor.name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
        cache=False,
    )


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if not _is_half(attribute):
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(_widened(attribute.as_tensor()).numpy()))
        else:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
