"""A quantized graph that reads its row of the scale tables from inputs, and the replacement of its tables.

insert_qdq gathers one row of the tables at each call (compiler/scales/timetable.py):

    scales_table [groups, n] -> Gather(row) -> [n] -> Split -> one scale for each quantizer, in the order of the plan

and the same for the zero points. While a pass still chooses the rows, a clone reads them from two graph inputs in place
of the two Gathers, so that one session serves every call with any row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Floats, Integers

from ..core.program import Program, Quantizer, Site
from ..errors import PassError
from ..graph.nodes import is_constant, is_op, name_of, numpy_of, remove_dead


@dataclass(frozen=True)
class ScaleTables:
    """The names of a graph's tables: the initializers `[groups, n]` and the rows `[n]` gathered from them."""

    scales: str
    zeros: str
    scales_row: str
    zeros_row: str


def table_quantizers(program: Program) -> dict[Site, Quantizer]:
    """Return the quantizers of the plan whose scales are tables, in the order of the columns."""
    return {site: q for site, q in program.require_plan().quantizers.items() if q.table}


def stacked(program: Program) -> tuple[Floats, Integers]:
    """Return (scales, zero points) of the plan in the form of the tables, both `[groups, n]`."""
    quantizers = list(table_quantizers(program).values())
    return np.stack([q.scale for q in quantizers], axis=1), np.stack([q.zero_point for q in quantizers], axis=1)


def find_tables(program: Program, where: str) -> ScaleTables:
    """Return the tables of the graph that have the rows of the plan. Raises PassError when there are none."""
    scales, zeros = (_gather_of(program.graph, table) for table in stacked(program))
    if scales is None or zeros is None:
        raise PassError(
            f"the graph has no table of {'scales' if scales is None else 'zero points'} with the plan's rows",
            where=where,
            hint="put the pass behind insert_qdq, with nothing in between that writes other scales",
        )
    (scale_table, scale_row), (zero_table, zero_row) = scales, zeros
    return ScaleTables(scale_table, zero_table, scale_row, zero_row)


def with_row_inputs(model: ir.Model, tables: ScaleTables) -> ir.Model:
    """Return a clone that reads its rows `[n]` from inputs named `scales_row` and `zeros_row`; it has no tables."""
    clone = model.clone()
    produced = {name_of(out): out for node in clone.graph for out in node.outputs}
    for name in (tables.scales_row, tables.zeros_row):
        gathered = produced[name]
        row = ir.Value(name=name, shape=gathered.shape, type=gathered.type)
        gathered.name = f"{name}_gathered"
        gathered.replace_all_uses_with(row)
        clone.graph.inputs.append(row)
    remove_dead(clone.graph)
    return clone


def replace_tables(graph: ir.Graph, tables: ScaleTables, scales: Floats, zeros: Integers) -> None:
    """Write other rows, both `[groups, n]`, into the tables of a graph."""
    for name, array in ((tables.scales, scales), (tables.zeros, zeros)):
        graph.initializers[name].const_value = ir.tensor(array, name=name)


def _gather_of(graph: ir.Graph, table: npt.NDArray[np.generic]) -> tuple[str, str] | None:
    """Return (name of the table, name of the row) of the Gather from a table with this content, or None."""
    for node in graph:
        if not is_op(node, "Gather") or node.inputs[0] is None or not is_constant(node.inputs[0]):
            continue
        content = numpy_of(node.inputs[0])
        if content.dtype == table.dtype and np.array_equal(content, table):
            return name_of(node.inputs[0]), name_of(node.outputs[0])
    return None
