"""Checks of a model file that other programs wrote, before anything runs or rewrites it.

1. The versions of ONNX and of its operations, and the inputs, are possible.
2. Names: each value is assigned once, each value that a node reads exists, and no value depends on itself. Nodes are
   put in order.
3. Sizes: nodes with those of functions and branches, turns of loops, nesting, tensors. A function that calls itself
   would overflow onnxruntime's stack, and a loop without an end would never return: a session cannot refuse them.
4. onnx's own checker: operations, attributes and their types.

The first fault is an error that names its place.
"""

from __future__ import annotations

import graphlib
import math
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from mezzotint.runtime.errors import MezzotintError

from ..errors import ModelError
from .limits import check_limit
from .model_costs import check_costs, subgraphs
from .tensor_checks import check_tensor, node_tensors, tensors

_HINT = "export the model again, or copy or download it again"
_SMALL = 1024  # elements: such constants stay for shape inference


def check_model(model: onnx.ModelProto, path: Path, *, oldest_opset: int = 1) -> None:
    """Raise ModelError for a model that is no valid ONNX or passes a limit; put its nodes in order.

    External data is checked on the disk, next to `path`, and not read.
    """
    where = str(path)
    if not model.HasField("graph") or not model.graph.node:
        raise ModelError("the file holds no graph", where=where, hint=_HINT)
    _check_versions(model, oldest_opset, where)
    check_costs(model, where)
    for function in model.functions:
        for what, tensor in node_tensors(function.node):
            check_tensor(what, tensor, path)
        _sort(function, where)
    _check_graph(model.graph, frozenset(), path)
    _check_inputs(model.graph, where)
    _check_with_onnx(model, where)


def _check_versions(model: onnx.ModelProto, oldest: int, where: str) -> None:
    if not 3 <= model.ir_version <= onnx.IR_VERSION:
        raise ModelError(
            f"the file has ONNX's IR version {model.ir_version}; versions 3 to {onnx.IR_VERSION} are known",
            where=where,
            hint="export the model again with another version",
        )
    opsets = [item for item in model.opset_import if item.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if not opsets:
        raise ModelError("the file does not state its opset", where=where, hint=_HINT)
    opset = opsets[0].version
    if opset > newest:
        raise ModelError(
            f"the file has opset {opset}; {newest} is the newest that this onnx knows",
            where=where,
            hint="export the model again with an earlier opset",
        )
    if opset < oldest:
        raise ModelError(
            f"the model has opset {opset}; {oldest} is the oldest that can be quantized",
            where=where,
            hint="export it again with a later opset, or convert it with onnx.version_converter",
        )
    domains = [item.domain for item in model.opset_import]
    if twice := next((name for name in domains if domains.count(name) > 1), None):
        raise ModelError(f"the opset of the domain {twice[:80]!r} is stated twice", where=where, hint=_HINT)


# -- names ------------------------------------------------------------------------------------------------------------


def _check_graph(graph: onnx.GraphProto, outer: frozenset[str], path: Path) -> None:
    """Check the names and tensors of a graph and of its subgraphs, and sort its nodes. `outer` are names around it."""
    where = str(path)
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise ModelError(
            f"the constant {name!r} is sparse, which is not supported", where=where, hint="export it as a dense tensor"
        )
    for what, tensor in tensors(graph):
        check_tensor(what, tensor, path)
    inputs = [value.name for value in graph.input]
    constants = [tensor.name for tensor in graph.initializer]
    outputs = [name for node in graph.node for name in node.output if name]
    for kind, names in (("inputs", inputs), ("constants", constants)):
        if twice := _twice(names):
            raise ModelError(f"two {kind} are called {twice[:200]!r}", where=where, hint=_HINT)
        if "" in names:
            raise ModelError(f"one of the {kind} has no name", where=where, hint=_HINT)
    if twice := _twice([*dict.fromkeys([*inputs, *constants]), *outputs]):
        raise ModelError(f"the value {twice[:200]!r} is assigned twice", where=where, hint=_HINT)
    if twice := _twice([node.name for node in graph.node if node.name]):
        raise ModelError(f"two nodes are called {twice[:200]!r}", where=where, hint=_HINT)
    known = outer.union(inputs, constants, outputs)
    for node in graph.node:
        if missing := next((name for name in node.input if name and name not in known), None):
            raise ModelError(
                f"node {_name(node)!r} reads {missing[:200]!r}, which nothing computes", where=where, hint=_HINT
            )
        for subgraph in subgraphs(node):
            _check_graph(subgraph, known, path)
    if missing := next((value.name for value in graph.output if value.name not in known), None):
        raise ModelError(f"nothing computes the output {missing[:200]!r}", where=where, hint=_HINT)
    if twice := _twice([value.name for value in graph.output]):
        raise ModelError(f"two outputs are called {twice[:200]!r}", where=where, hint=_HINT)
    _sort(graph, where)


def _twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.op_type)[:200]


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node or its subgraphs read; names inside a subgraph may be among them."""
    names = set(node.input)
    for subgraph in subgraphs(node):
        names.update(value.name for value in subgraph.output)
        for inner in subgraph.node:
            names |= _reads(inner)
    return names


def _sort(graph: onnx.GraphProto | onnx.FunctionProto, where: str) -> None:
    """Put each node behind those that compute its inputs. Raises ModelError for a value that depends on itself.

    onnxruntime sorts for itself, and converters to half precision leave their Casts at the end of the list.
    """
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    needs = {i: {maker[name] for name in _reads(node) if name in maker} for i, node in enumerate(graph.node)}
    if all(max(earlier, default=-1) < i for i, earlier in needs.items()):
        return
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        ring = [_name(graph.node[i]) for i in error.args[1][:6]]
        raise ModelError(
            f"the nodes cannot be put in order, the graph has a cycle: {' -> '.join(repr(name) for name in ring)}",
            where=where,
            hint=_HINT,
        ) from error
    nodes = [graph.node[i] for i in order]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


# -- inputs and values ------------------------------------------------------------------------------------------------


def _check_inputs(graph: onnx.GraphProto, where: str) -> None:
    if not graph.input:
        raise ModelError("the graph has no inputs", where=where, hint=_HINT)
    if not graph.output:
        raise ModelError("the graph has no outputs", where=where, hint=_HINT)
    given = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    if idle := next((value.name for value in graph.output if value.name in given), None):
        raise ModelError(f"no node computes the output {idle[:200]!r}: it is given", where=where, hint=_HINT)
    for value in graph.input:
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"the input {value.name[:200]!r} is not a tensor", where=where, hint=_HINT)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        _check_shape(value, "values", where)


def _check_shape(value: onnx.ValueInfoProto, bound: str, where: str) -> None:
    shape = value.type.tensor_type.shape
    sizes = [dim.dim_value for dim in shape.dim if dim.HasField("dim_value")]
    check_limit("rank", len(shape.dim), f"the value {value.name[:200]!r} has too many dimensions", where)
    if min(sizes, default=0) < 0:
        raise ModelError(f"the value {value.name[:200]!r} has a negative size: {sizes}", where=where, hint=_HINT)
    check_limit(bound, math.prod(sizes), f"the value {value.name[:200]!r} has {sizes} numbers", where)


def _check_with_onnx(model: onnx.ModelProto, where: str) -> None:
    """Run onnx's checker and its shape inference on the model without its large constants."""
    bare = _without_weights(model)
    constant = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if constant.issuperset(name for name in node.input if name) and not subgraphs(node):
            constant.update(node.output)
    try:
        onnx.checker.check_model(bare)
        _check_values(bare, constant, where, values=False)
        # Inference writes the values of a Range out, as many as there are: the size is known above, or not at all.
        if not any(node.op_type == "Range" for node in model.graph.node):
            _check_values(bare, constant, where, values=True)
    except MezzotintError:
        raise
    except Exception as error:  # the checker raises its own, ValueError, RuntimeError and errors of protobuf
        raise ModelError(f"this is not a valid ONNX model: {_line(error)}", where=where, hint=_HINT) from error


def _check_values(bare: onnx.ModelProto, constant: set[str], where: str, *, values: bool) -> None:
    """Raise ModelError for a tensor that is too large. With `values` sizes that the graph computes are known, too."""
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=values)
    for value in inferred.graph.value_info:
        _check_shape(value, "constants" if value.name in constant else "values", where)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose large constants are inputs; shapes that the file claims for inner values are left out."""
    graph = model.graph
    bare = onnx.ModelProto(ir_version=max(model.ir_version, 4))  # since 4 a constant needs no input of its name
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    bare.graph.name = graph.name or "graph"
    bare.graph.node.extend(graph.node)
    bare.graph.input.extend(graph.input)
    bare.graph.output.extend(graph.output)
    inputs = {value.name for value in graph.input}
    for tensor in graph.initializer:
        small = tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= _SMALL
        if small:
            bare.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return bare


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
