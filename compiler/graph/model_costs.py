"""How many nodes a model has, and how many one call of it runs: with functions, branches and the turns of loops.

A function that calls itself would overflow onnxruntime's stack, and a loop without an end would never return: a session
cannot refuse them. The number of turns of a loop must be a constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx
from onnx import AttributeProto, TensorProto

from ..errors import ModelError
from .limits import check_limit, limit

_HINT = "export the model again, or copy or download it again"
_UNKNOWN_TURNS = 1 << 63


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs in a node's attributes."""
    found = []
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH or attribute.HasField("g"):
            found.append(attribute.g)
        found.extend(attribute.graphs)
    return found


Functions = Mapping[tuple[str, str], onnx.FunctionProto]


def _functions(model: onnx.ModelProto, where: str) -> Functions:
    """Return the local functions by (domain, name)."""
    functions = {(function.domain, function.name): function for function in model.functions}
    if len(functions) < len(model.functions):
        raise ModelError("two functions of the file have one name", where=where, hint=_HINT)
    return functions


def check_costs(model: onnx.ModelProto, where: str) -> None:
    """Raise ModelError for a graph of too many nodes or turns of loops, and for functions that call themselves."""
    functions = _functions(model, where)
    costs = _Costs(model, functions, where)
    nodes, operations = costs.of_graph(model.graph, {}, 0)
    check_limit("nodes", nodes, "the graph has many nodes, with those of its functions and branches", where)
    what = "the graph has a loop without an end" if operations >= _UNKNOWN_TURNS else "the graph has long loops"
    check_limit("operations", operations, f"{what}; operations of one call", where)


class _Costs:
    """Counts of nodes: as they are written out, and as one call of the network runs them."""

    def __init__(self, model: onnx.ModelProto, functions: Functions, where: str) -> None:
        self._functions = functions
        self._where = where
        self._most = limit("depth")
        self._known: dict[tuple[str, str], tuple[int, int]] = {}
        self._running: list[tuple[str, str]] = []

    def of_graph(self, graph: onnx.GraphProto, numbers: Mapping[str, int], depth: int) -> tuple[int, int]:
        found = {tensor.name: value for tensor in graph.initializer if (value := _number(tensor)) is not None}
        return self._of_nodes(graph.node, {**numbers, **found}, depth)

    def _of_nodes(self, nodes: Sequence[onnx.NodeProto], numbers: dict[str, int], depth: int) -> tuple[int, int]:
        if depth > self._most:
            check_limit("depth", depth, "subgraphs or functions lie deep in each other", self._where)
        written = run = 0
        for node in nodes:
            if node.op_type == "Constant" and node.output and (value := _constant(node)) is not None:
                numbers[node.output[0]] = value
            key = node.domain, node.op_type
            inner = [self._of_function(key, depth)] if key in self._functions else []
            inner += [self.of_graph(subgraph, numbers, depth + 1) for subgraph in subgraphs(node)]
            turns = self._turns(node, numbers)
            written += 1 + sum(nodes for nodes, _ in inner)
            run += 1 + turns * sum(operations for _, operations in inner)
        return written, run

    def _of_function(self, key: tuple[str, str], depth: int) -> tuple[int, int]:
        if key in self._running:
            raise ModelError(f"the function {key[1][:200]!r} calls itself", where=self._where, hint=_HINT)
        if key not in self._known:
            self._running.append(key)
            # Functions may call each other more deeply than subgraphs lie in each other: they are written side by side.
            if len(self._running) > 4 * self._most:
                check_limit("depth", len(self._running), "functions call each other deeply", self._where)
            self._known[key] = self._of_nodes(self._functions[key].node, {}, 0)
            self._running.pop()
        return self._known[key]

    def _turns(self, node: onnx.NodeProto, numbers: Mapping[str, int]) -> int:
        if node.op_type != "Loop" or node.domain not in ("", "ai.onnx"):
            return 1
        return max(0, numbers.get(node.input[0], _UNKNOWN_TURNS)) if node.input else _UNKNOWN_TURNS


def _number(tensor: TensorProto) -> int | None:
    """Return the value of an integer tensor of one element that is in the file."""
    if tensor.data_type != TensorProto.INT64 or math.prod(tensor.dims) != 1:
        return None
    if tensor.HasField("raw_data"):
        return int.from_bytes(tensor.raw_data, "little", signed=True) if len(tensor.raw_data) == 8 else None
    return int(tensor.int64_data[0]) if len(tensor.int64_data) == 1 else None


def _constant(node: onnx.NodeProto) -> int | None:
    for attribute in node.attribute:
        if attribute.name == "value_int":
            return int(attribute.i)
        if attribute.name == "value":
            return _number(attribute.t)
    return None
