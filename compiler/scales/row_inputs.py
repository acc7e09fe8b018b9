"""A quantized graph whose row of the scale tables is handed in from outside, and tables put back into the graph.

insert_qdq gathers one row of the tables at each call (compiler/scales/timetable.py):

    scales_table [groups, n] -> Gather(row) -> [n] -> Split -> one scale for each quantizer, in the order of the plan

and the same for the zero points. While the rows are still being decided, a clone reads them from two graph inputs in
place of the two Gathers: one session serves every call, whatever row it is given.
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
    """What the tables of a graph are called: the initializers `[groups, n]`, and the rows `[n]` gathered from them."""

    scales: str
    zeros: str
    scales_row: str
    zeros_row: str


def table_quantizers(program: Program) -> dict[Site, Quantizer]:
    """The quantizers of the plan whose scales are tables, in the order of the columns."""
    return {site: q for site, q in program.require_plan().quantizers.items() if q.table}


def stacked(program: Program) -> tuple[Floats, Integers]:
    """(scales, zero points) of the plan as the tables hold them, both `[groups, n]`."""
    found = list(table_quantizers(program).values())
    return np.stack([q.scale for q in found], axis=1), np.stack([q.zero_point for q in found], axis=1)


def find_tables(program: Program, where: str) -> ScaleTables:
    """The tables in the graph that hold what the plan says. Raises PassError when they are not there."""
    scales, zeros = stacked(program)
    found = [_gather_of(program.graph, table) for table in (scales, zeros)]
    if found[0] is None or found[1] is None:
        raise PassError(
            f"the graph has no table of {'scales' if found[0] is None else 'zero points'} with the plan's rows",
            where=where,
            hint="put the pass behind insert_qdq, with nothing in between that writes other scales",
        )
    (scale_table, scale_row), (zero_table, zero_row) = found[0], found[1]
    return ScaleTables(scale_table, zero_table, scale_row, zero_row)


def with_row_inputs(model: ir.Model, tables: ScaleTables) -> ir.Model:
    """A clone that reads its rows from inputs of the names `scales_row` and `zeros_row`, `[n]`; no table is left."""
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
    """(name of the table, name of the row) where the graph gathers a row of a table with this content."""
    for node in graph:
        if not is_op(node, "Gather") or node.inputs[0] is None or not is_constant(node.inputs[0]):
            continue
        held = numpy_of(node.inputs[0])
        if held.dtype == table.dtype and np.array_equal(held, table):
            return name_of(node.inputs[0]), name_of(node.outputs[0])
    return None
