"""clean_qdq: remove quantizers, or move them to smaller data, without changing a number.

1. Q(move(x)) -> move(Q(x)), where all readers of a Transpose, Reshape or nearest Resize quantize it with the same
   per-tensor quantizer. The data mover then works on 8-bit data, a quarter of the bytes. A per-tensor quantizer does
   not depend on the position of a value; a per-channel one does and stays.
2. Q(DQ(q)) -> q, where both have the same scale and zero point.
3. Q and DQ nodes with the same inputs become one node.
4. Shape(DQ(q)) -> Shape(q). onnxruntime copies a DQ for each of its readers, and would dequantize a whole feature map
   only to read its size.
5. DepthToSpace(DQ(q)) -> DQ(DepthToSpace(q)), and the Slice behind it, where q has one scale (lower_transposed writes
   these two). Bytes move in a fifth of the time of floats.

Cases 1 and 5 put a data mover between Q and DQ. With the lowering `constant` they are left out: other engines make no
integer kernel behind such a mover.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.elementwise import make_scalars
from mezzotint.compiler.graph.nodes import Builder, Names, consumers, is_op, name_of, remove_dead, replace_use
from mezzotint.compiler.graph.ops import is_mover


@dataclass(frozen=True)
class CleanQdq(Pass):
    """It has no options; the cases are numbered in the module's docstring."""

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def run(self, program: Program, context: Context) -> Program:
        graph = program.graph
        names = Names(graph)
        adjacent = program.lowering == "constant"
        sunk = 0 if adjacent else sum(_sink(graph, names, node) for node in list(graph))  # case 5, before case 2
        moved = 0 if adjacent else _hoist_until_still(graph, names)  # case 1
        undone = _drop_round_trips(graph)  # case 2
        merged = _merge_equal(graph)  # case 3
        measured = _measure_integers(graph)  # case 4
        make_scalars(graph)
        remove_dead(graph)
        return program.noted(
            f"{moved} moved in front of data movers, {undone} round trips gone, {merged} merged, "
            f"{measured} shapes taken from integers" + (f", {sunk} moved behind DepthToSpace" if sunk else "")
        )


def _hoist_until_still(graph: ir.Graph, names: Names) -> int:
    total = 0
    while moved := sum(_hoist(graph, names, node) for node in list(graph) if is_mover(node)):
        total += moved
    return total


def _same_parameters(a: ir.Node, b: ir.Node) -> bool:
    """Return whether two Q or DQ nodes have the same scale and zero point: the same values, or equal scalars."""
    return all(x is y or _equal_scalars(x, y) for x, y in zip(a.inputs[1:], b.inputs[1:], strict=True))


def _equal_scalars(x: ir.Value | None, y: ir.Value | None) -> bool:
    tensors = [None if v is None else v.const_value for v in (x, y)]
    if tensors[0] is None or tensors[1] is None or tensors[0].size != 1 or tensors[1].size != 1:
        return False
    return tensors[0].dtype == tensors[1].dtype and bool(tensors[0].numpy() == tensors[1].numpy())


def _hoist(graph: ir.Graph, names: Names, mover: ir.Node) -> bool:
    source, out = mover.inputs[0], mover.outputs[0]
    readers = consumers(out)
    if source is None or out.is_graph_output() or not readers:
        return False
    first = readers[0]
    if not all(is_op(r, "QuantizeLinear") and _same_parameters(r, first) for r in readers):
        return False
    scale, zero = first.inputs[1], first.inputs[2]
    if scale is None or zero is None or scale.shape is None or list(scale.shape) not in ([], [1]):
        return False  # a per-channel quantizer depends on the position of a value
    integer = first.outputs[0].dtype
    build = Builder(graph, names, mover)
    early = build.op("QuantizeLinear", [source, scale, zero], f"{name_of(source)}_early", like=source, dtype=integer)
    mover.replace_input_with(0, early)
    out.type = ir.TensorType(zero.dtype or ir.DataType.UINT8)
    for quantize in readers:
        quantize.outputs[0].replace_all_uses_with(out)
        graph.remove(quantize, safe=True)
    return True


def _sink(graph: ir.Graph, names: Names, mover: ir.Node) -> bool:
    """Move the DequantizeLinear in front of a DepthToSpace, or of the Slice behind one, to its output."""
    source = mover.inputs[0] if is_op(mover, "DepthToSpace", "Slice") else None
    pair = None if source is None else source.producer()
    if source is None or pair is None or not is_op(pair, "DequantizeLinear") or consumers(source) != [mover]:
        return False
    integers, scale, zero = pair.inputs[:3]
    out = mover.outputs[0]
    if integers is None or scale is None or scale.shape is None or list(scale.shape) not in ([], [1]):
        return False
    if source.is_graph_output() or out.is_graph_output():
        return False
    if is_op(mover, "Slice") and not is_op(integers.producer(), "DepthToSpace"):
        return False
    readers = consumers(out)
    mover.replace_input_with(0, integers)
    build = Builder(graph, names, after=mover)
    dequantized = build.op("DequantizeLinear", [out, scale, zero], f"{name_of(out)}_dequantized", like=out)
    out.type = integers.type
    for reader in readers:
        replace_use(reader, out, dequantized)
    return True


def _drop_round_trips(graph: ir.Graph) -> int:
    count = 0
    for node in list(graph):
        inner = node.inputs[0].producer() if is_op(node, "QuantizeLinear") and node.inputs[0] is not None else None
        if is_op(inner, "DequantizeLinear") and inner is not None and _same_parameters(node, inner):
            integers = inner.inputs[0]
            if (
                integers is not None
                and integers.dtype == node.outputs[0].dtype
                and not node.outputs[0].is_graph_output()
            ):
                node.outputs[0].replace_all_uses_with(integers)
                graph.remove(node, safe=True)
                count += 1
    return count


def _measure_integers(graph: ir.Graph) -> int:
    count = 0
    for node in graph:
        pair = node.inputs[0].producer() if is_op(node, "Shape") and node.inputs[0] is not None else None
        if is_op(pair, "DequantizeLinear") and pair is not None:
            node.replace_input_with(0, pair.inputs[0])
            count += 1
    return count


def _identity(value: ir.Value | None) -> object:
    """Return a key that equal parameters share: the value itself, or the contents of a scalar that is stored twice."""
    tensor = None if value is None else value.const_value
    return (tensor.dtype, tensor.tobytes()) if tensor is not None and tensor.size == 1 else value


def _merge_equal(graph: ir.Graph) -> int:
    seen: dict[tuple[object, ...], ir.Node] = {}
    count = 0
    for node in list(graph):
        if not is_op(node, "QuantizeLinear", "DequantizeLinear"):
            continue
        axis = node.attributes["axis"].value if "axis" in node.attributes else None
        key = (node.op_type, node.inputs[0], axis, *(_identity(v) for v in node.inputs[1:]))
        first = seen.setdefault(key, node)
        if first is not node and not node.outputs[0].is_graph_output():
            for reader in consumers(node.outputs[0]):
                replace_use(reader, node.outputs[0], first.outputs[0])
            graph.remove(node, safe=True)
            count += 1
    return count
