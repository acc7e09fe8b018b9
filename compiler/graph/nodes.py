"""Helpers over onnx_ir graphs: names, constants, insertion and replacement of nodes, text, digest."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from . import weight_store as store
from .scopes import scope_of, within

DEFAULT_DOMAINS = ("", "ai.onnx")
MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operations."""


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Return whether a node is one of these operations of the standard domain."""
    return node is not None and node.domain in DEFAULT_DOMAINS and node.op_type in op_types


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is known at compile time: an initializer that is not also an input."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def name_of(value: ir.Value | None) -> str:
    """Return a value's name, or the empty string for an absent optional input."""
    return "" if value is None or value.name is None else value.name


class Names:
    """Unique, readable names for the values and nodes that a pass adds to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._taken = set(graph.initializers) | {name_of(v) for v in graph.inputs}
        for node in graph:
            self._taken.update(name_of(v) for v in node.outputs)
            self._taken.add(node.name or "")

    def unique(self, preferred: str) -> str:
        """Return the preferred name, followed by a number when it is taken, and mark it as taken."""
        name, k = preferred, 1
        while name in self._taken:
            name, k = f"{preferred}_{k}", k + 1
        self._taken.add(name)
        return name


def initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initializer to the graph, with type and shape, and return it."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


class Builder:
    """Adds initializers and nodes with unique names, in front of one node (`before`) or in order behind one (`after`).

    New nodes get the scope of that node, or `scope` when the node only marks the position.
    """

    def __init__(
        self,
        graph: ir.Graph,
        names: Names,
        before: ir.Node | None = None,
        *,
        after: ir.Node | None = None,
        scope: str | None = None,
    ) -> None:
        anchor = before or after
        if anchor is None or (before is not None and after is not None):
            raise ValueError("give a builder either the node to add in front of or the node to add behind")
        self.graph, self.names = graph, names
        self._before, self._after = before, after
        self._scope = scope_of(anchor) if scope is None else scope

    def constant(self, preferred: str, array: npt.ArrayLike | ir.TensorProtocol) -> ir.Value:
        """Add an initializer with this content."""
        name = self.names.unique(preferred)
        if isinstance(array, ir.TensorProtocol):
            tensor: ir.TensorProtocol = array
            tensor.name = name
        else:
            tensor = ir.tensor(np.asarray(array), name=name)
        return initializer(self.graph, name, tensor)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        preferred: str,
        *,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | Sequence[Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        name: str | None = None,
    ) -> ir.Value:
        """Add a node with one output and return the output.

        The output gets the preferred name, and the node the same one in the builder's scope, unless `name` is given.
        Type and shape are `dtype` and `shape`, else those of `like`.
        """
        known = shape if shape is not None else (like.shape if like is not None else None)
        element = dtype if dtype is not None else (like.dtype if like is not None else None)
        out = ir.Value(
            name=self.names.unique(preferred),
            shape=None if known is None else ir.Shape(known),
            type=None if element is None else ir.TensorType(element),
        )
        self._insert(
            ir.node(
                op_type,
                inputs,
                attributes or {},
                domain=domain,
                outputs=[out],
                name=name or within(self._scope, name_of(out)),
            )
        )
        return out

    def split(self, value: ir.Value, sizes: Sequence[int], preferred: str) -> list[ir.Value]:
        """Add a Split of a vector and return its parts, of these sizes."""
        kind = None if value.dtype is None else ir.TensorType(value.dtype)
        parts = [ir.Value(name=self.names.unique(preferred), shape=ir.Shape([n]), type=kind) for n in sizes]
        lengths = self.constant(f"{preferred}_sizes", np.array(sizes, np.int64))
        node = ir.node(
            "Split",
            [value, lengths],
            {"axis": 0},
            outputs=parts,
            name=within(self._scope, self.names.unique(f"{preferred}_split")),
        )
        self._insert(node)
        return parts

    def _insert(self, node: ir.Node) -> None:
        if self._before is not None:
            self.graph.insert_before(self._before, node)
        elif self._after is not None:
            self.graph.insert_after(self._after, node)
            self._after = node


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Replace `old` by `new` in every consumer and in the graph's outputs. A graph output keeps its name."""
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}_before"
        new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def replace_use(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Replace `old` by `new` in the inputs of one node."""
    for i, value in enumerate(node.inputs):
        if value is old:
            node.replace_input_with(i, new)


def consumers(value: ir.Value) -> list[ir.Node]:
    """Return the distinct nodes that read a value, in a stable order."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def remove_dead(graph: ir.Graph) -> None:
    """Remove the nodes whose outputs are not read, and the initializers that are not used."""
    for node in reversed(list(graph)):
        if all(not out.uses() and not out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]


def counts(graph: ir.Graph) -> Counter[str]:
    """Return the number of nodes of each operation, named `domain.op_type` outside the standard domain."""
    return Counter(n.op_type if n.domain in DEFAULT_DOMAINS else f"{n.domain}.{n.op_type}" for n in graph)


def model_text(model: ir.Model) -> str:
    """Return the model as ONNX text, one initializer a line, without their contents."""
    raw = ir.to_onnx_text(model, exclude_initializers=True)
    head, brace, body = raw.partition("\n{")
    return re.sub(r", (?=\w+(?:\[[^]]*\])? [\"\w])", ",\n      ", head) + brace + body


def text_diff(before: str, after: str, name: str) -> str:
    """Return the unified diff of two texts, without context: empty when they are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", f"after {name}", lineterm="", n=0)
    return "\n".join(lines)


def digest(model: ir.Model) -> str:
    """Return the SHA-256 of the graph's text and constants: stored weights by their offset, the others by content.

    A program that was saved and loaded has the same digest, although more of its constants are in files.
    """
    sha = hashlib.sha256(ir.to_onnx_text(model, exclude_initializers=True).encode())
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        sha.update(name.encode())
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == store.WEIGHTS:
            sha.update(f"{tensor.offset}+{tensor.length}".encode())
        elif tensor is not None:
            sha.update(tensor.tobytes())
    return sha.hexdigest()


def known_ints(shape: ir.Shape | None, dims: Iterable[int]) -> list[int] | None:
    """Return the sizes of these dimensions when all are known, else None."""
    if shape is None:
        return None
    sizes = [shape[d] for d in dims]
    return [int(s) for s in sizes if isinstance(s, int)] if all(isinstance(s, int) for s in sizes) else None


def numpy_of(value: ir.Value) -> npt.NDArray[Any]:
    """Return the array of an initializer. A stored weight stays mapped as long as the array lives.

    Raises ValueError for a value that is not a constant.
    """
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"{value.name} is not a constant")
    if isinstance(tensor, ir.ExternalTensor):  # it would keep its mapping: a copy is freed together with the array
        tensor = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=tensor.base_dir,
        )
    return np.asarray(tensor.numpy())
