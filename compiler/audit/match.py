"""Which node of the graph that onnxruntime built runs which node of the file.

1. By name: onnxruntime keeps the names of nodes where it can, and appends suffixes for its changes.
2. By values, where a node has no name or lost it: from the first values behind the kernel whose names the file has, the
   search goes up in the file's graph, as far as the values that the kernel reads, until a node of the kernel's kind.
3. By origins, where the names of values are lost too: the node that reads all values that the kernel reads.
"""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir

from ..graph.nodes import is_op, name_of
from .built import FLOAT_KERNELS
from .groups import MATRICES, WRITTEN, is_ort_mover

_CONVOLUTIONS = ("Conv", "QLinearConv", "ConvInteger")
_PRODUCTS = ("MatMul", "Gemm", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger")
_BECOME = ("FusedMatMul", "FusedGemm", "DynamicQuantizeMatMul", "MatMulNBits")
_FAMILIES = (
    (frozenset({*_CONVOLUTIONS, "FusedConv", "NhwcFusedConv"}), frozenset(_CONVOLUTIONS)),
    (frozenset({*_PRODUCTS, *_BECOME}), frozenset(_PRODUCTS)),
)
_SUFFIX = re.compile(r"(_token_\d+|_nhwc|_transpose|/[A-Za-z]+Fusion/?)$")
_BLOCKED = re.compile(r"_nchwc(_token_\d+)?$")  # such a node has the name of the value that it makes


def is_float_kernel(node: ir.Node) -> bool:
    """Return whether a node of a built graph multiplies matrices in float (4-bit weights included)."""
    return node.op_type in FLOAT_KERNELS or node.op_type == "MatMulNBits"


def is_integer_kernel(node: ir.Node) -> bool:
    """Return whether a node of a built graph computes on integers. Nodes that only move integers do not count."""
    return node.op_type in WRITTEN


def moves_integers(node: ir.Node) -> bool:
    """Return whether a node of a built graph moves integers. The graph has no types, so its data is followed back."""
    at: ir.Node | None = node
    while at is not None and is_ort_mover(at) and at.inputs[0] is not None:
        value = at.inputs[0]
        at = value.producer()
        if at is None:
            return value.dtype is not None and value.dtype.is_integer()
    return at is not None and (
        is_op(at, "QuantizeLinear", "DynamicQuantizeLinear") or at.op_type.startswith(("QLinear", "QGemm"))
    )


class Match:
    """The kernels of a file's nodes: `of(node)` is a node of the built graph, or None. `strays` match no node."""

    def __init__(self, file: ir.Graph, built: ir.Graph) -> None:
        nodes = list(file.all_nodes())
        names = Counter(node.name for node in nodes if node.name)
        self._named = {node.name: node for node in nodes if node.name and names[node.name] == 1}
        self._made = {name_of(out): node for node in nodes for out in node.outputs}
        self._values = set(self._made) | set(file.initializers) | {name_of(v) for v in file.inputs}
        self._built = {name_of(out): node for node in built.all_nodes() for out in node.outputs}
        self._known = {name_of(v): v for v in (*file.inputs, *(out for node in nodes for out in node.outputs))}
        self._runs: dict[ir.Node, ir.Node] = {}
        self._ran: dict[ir.Node, ir.Node] = {}
        kernels = list(built.all_nodes())
        for kernel in kernels:
            self._claim(self._by_name(kernel), kernel)
        taken = set(self._runs.values())
        self.strays: list[ir.Node] = []
        for kernel in kernels:
            if kernel not in taken and (is_float_kernel(kernel) or is_integer_kernel(kernel)):
                node = self._by_values(kernel) or self._by_origins(kernel)
                self._claim(node, kernel)
                if node is None:
                    self.strays.append(kernel)

    def of(self, node: ir.Node) -> ir.Node | None:
        if node in self._runs:
            return self._runs[node]
        for out in node.outputs:
            quantized = [r.outputs[0] for r in out.consumers() if is_op(r, "QuantizeLinear")]
            for value in (out, *quantized):
                kernel = self._built.get(name_of(value))
                if kernel is not None and _same(node, kernel):
                    return kernel
        return None

    def makes(self, value: ir.Value) -> ir.Node | None:
        """Return the node of the built graph that makes a value of the file, or None when its name is gone."""
        return self._built.get(name_of(value))

    def _claim(self, node: ir.Node | None, kernel: ir.Node) -> None:
        if node is not None and node not in self._runs:
            self._runs[node] = kernel
            self._ran[kernel] = node

    def _by_name(self, kernel: ir.Node) -> ir.Node | None:
        name = kernel.name or ""
        if _BLOCKED.search(name):
            return None
        while name:
            node = self._named.get(name)
            if node is not None:
                return node if _same(node, kernel) else None
            shorter = _SUFFIX.sub("", name)
            if shorter == name:
                return None
            name = shorter
        return None

    def _by_values(self, kernel: ir.Node) -> ir.Node | None:
        stem = _BLOCKED.sub("", kernel.name or "")
        ends = [stem] if stem != kernel.name and stem in self._made else self._ends(kernel)
        starts = self._starts(kernel)
        todo, seen = [self._made[end] for end in ends if end in self._made], set[ir.Node]()
        while todo:
            node = todo.pop(0)
            if node in seen:
                continue
            seen.add(node)
            if _same(node, kernel) and node not in self._runs:
                return node
            if is_op(node, *MATRICES):
                continue  # beyond another layer is not what this kernel computes
            inputs = [v for v in node.inputs if v is not None and name_of(v) not in starts]
            todo += [maker for v in inputs if (maker := v.producer()) is not None]
        return None

    def _by_origins(self, kernel: ir.Node) -> ir.Node | None:
        """Return the node that reads all that the kernel reads, as computed by kernels that were matched before it.

        Names are lost on both sides where onnxruntime runs unnamed nodes channels last, one after another.
        """
        candidates: list[ir.Node] | None = None
        for origin in self._origins(kernel):
            reached = self._reached(origin, kernel)
            candidates = reached if candidates is None else [node for node in candidates if node in reached]
        return candidates[0] if candidates else None

    def _origins(self, kernel: ir.Node) -> list[tuple[ir.Value, ...]]:
        todo, origins = [v for v in kernel.inputs if v is not None], list[tuple[ir.Value, ...]]()
        while todo:
            value = todo.pop(0)
            maker = value.producer()
            if name_of(value) in self._known:
                origins.append((self._known[name_of(value)],))
            elif maker in self._ran:
                origins.append(tuple(self._ran[maker].outputs))
            elif maker is not None:
                todo += [v for v in maker.inputs if v is not None]
        return origins

    def _reached(self, origin: tuple[ir.Value, ...], kernel: ir.Node) -> list[ir.Node]:
        """Return nodes of the file that the kernel may run, and that read an origin directly or through quantizers."""
        todo, reached = list(origin), list[ir.Node]()
        while todo:
            for node in todo.pop(0).consumers():
                if is_op(node, "QuantizeLinear", "DequantizeLinear") or is_ort_mover(node):
                    todo += node.outputs
                elif _same(node, kernel) and node not in self._runs:
                    reached.append(node)
        return reached

    def _ends(self, kernel: ir.Node) -> list[str]:
        """Return the first values behind a kernel whose names the file has, without passing another kernel."""
        todo, ends = list(kernel.outputs), list[str]()
        while todo:
            value = todo.pop(0)
            if name_of(value) in self._values:
                ends.append(name_of(value))
                continue
            for node in value.consumers():
                if not is_float_kernel(node) and not is_integer_kernel(node):
                    todo += node.outputs
        return ends

    def _starts(self, kernel: ir.Node) -> set[str]:
        """Return the last values in front of a kernel whose names the file has."""
        todo, starts = [v for v in kernel.inputs if v is not None], set[str]()
        while todo:
            value = todo.pop(0)
            if name_of(value) in self._values:
                starts.add(name_of(value))
            elif (maker := value.producer()) is not None:
                todo += [v for v in maker.inputs if v is not None]
        return starts


def _same(node: ir.Node, kernel: ir.Node) -> bool:
    """Return whether a kernel can run a node: it is the same operation, or one of its integer and fused forms."""
    if kernel.op_type in (node.op_type, f"QLinear{node.op_type}"):
        return True
    return any(kernel.op_type in kernels and node.op_type in nodes for kernels, nodes in _FAMILIES)
