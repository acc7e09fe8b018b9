"""The compiled graph as data for the page: nodes, values, and a drawing with positions for each block.

Only names, types and attributes are read from the file, no weights. Values and nodes are numbers in the page's data;
their tables are `values` ([name, type, the node that computes it or -1]) and `nodes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.compiler.audit.kernels import FLOAT_KERNELS, INTEGER_KERNELS

from ..bench.trace import group_of
from .blocks import make_blocks
from .data import PageData
from .drawings import Drawings, ends_of

if TYPE_CHECKING:
    import onnx_ir as ir

NODE_KINDS = ("integer", "island", "unfused", "float", "quantize", "layout", "table")
_LONGEST = 120  # characters of an attribute
_SHAPES = frozenset({"Shape", "Size", "ConstantOfShape", "Range", "Constant"})


def read_graph(
    model: Path, timestep: str, layers: Mapping[str, Mapping[str, Any]], islands: Mapping[str, str]
) -> PageData:
    """Read a bundle's ONNX file. `layers` has the rows of the fusion audit by name, `islands` the reasons by name."""
    from mezzotint.compiler.graph.model_file import read_model

    graph = read_model(model).graph
    nodes = list(graph)
    numbers = {node: i for i, node in enumerate(nodes)}
    values: dict[ir.Value, int] = {}

    def number(value: ir.Value) -> int:
        return values.setdefault(value, len(values))

    tables = _tables(nodes, [v for v in graph.inputs if v.name != timestep])
    edges = sorted(
        {(numbers[maker], i) for i, n in enumerate(nodes) for v in n.inputs if v and (maker := v.producer()) in numbers}
    )
    names = tuple(node.name or f"{node.op_type} {i}" for i, node in enumerate(nodes))
    kinds = [_kind(n, names[i], i in tables, layers, islands) for i, n in enumerate(nodes)]
    rows = []
    for i, node in enumerate(nodes):
        row: dict[str, Any] = {
            "name": names[i],
            "op": node.op_type,
            "kind": NODE_KINDS.index(kinds[i]),
            "in": [-1 if v is None else number(v) for v in node.inputs],
            "out": [number(v) for v in node.outputs],
        }
        if node.domain:
            row["domain"] = node.domain
        if attributes := {a.name: _attribute(a) for a in node.attributes.values()}:
            row["attributes"] = attributes
        rows.append(row)
    outputs = [number(v) for v in graph.outputs]
    inputs = [number(v) for v in graph.inputs]
    table = [[v.name or "", _type(v), -1 if (p := v.producer()) is None else numbers.get(p, -1)] for v in values]
    tree = make_blocks(names, edges, tables)
    blocks = Drawings(tree, edges, ends_of(rows, table, inputs, outputs), kinds, names, NODE_KINDS).to_json()
    return {"kinds": NODE_KINDS, "nodes": rows, "values": table, "inputs": inputs, "outputs": outputs, "blocks": blocks}


def _tables(nodes: Sequence[ir.Node], others: Sequence[ir.Value]) -> frozenset[int]:
    """Return the nodes that depend on no input but the timestep."""
    foreign = set(others)
    tables = set()
    for i, node in enumerate(nodes):
        inner = [v for a in node.attributes.values() if a.type.name == "GRAPH" for n in a.as_graph() for v in n.inputs]
        if foreign.isdisjoint([*node.inputs, *inner]):
            tables.add(i)
        else:
            foreign.update(node.outputs)
    return frozenset(tables)


def _kind(
    node: ir.Node,
    name: str,
    table: bool,
    layers: Mapping[str, Mapping[str, Any]],
    islands: Mapping[str, str],
) -> str:
    if table:
        return "table"
    op, row = node.op_type, layers.get(name)
    if op in INTEGER_KERNELS or op in FLOAT_KERNELS or name in islands:
        integer = op in INTEGER_KERNELS if row is None else row["integer"]
        return "integer" if integer else "island" if name in islands else "unfused"
    group = group_of(op)
    if group == "quantize and dequantize":
        return "quantize"
    return "layout" if group == "layout" or op in _SHAPES else "float"


def _type(value: ir.Value) -> str:
    sizes = [] if value.shape is None else ["?" if size is None else str(size) for size in _sizes(value.shape)]
    shape = "" if value.shape is None else f"[{', '.join(sizes)}]"
    kind = "" if value.dtype is None else value.dtype.name.lower()
    return f"{kind}{shape}" + (" constant" if value.const_value is not None else "")


def _sizes(shape: ir.Shape) -> list[int | str | None]:
    return [size if isinstance(size, int) else size.value for size in shape]


def _attribute(attribute: ir.Attr) -> str:
    kind = attribute.type.name
    if kind in ("TENSOR", "SPARSE_TENSOR", "GRAPH", "GRAPHS"):
        return kind.lower()
    text = str(attribute.value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
