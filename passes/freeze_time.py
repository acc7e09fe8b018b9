"""freeze_time: replace everything that depends only on the timestep by tables over the deployed timesteps.

Source: TFMQ-DM (arXiv 2311.16503) and its journal version, which observe that the time embedding and each block's
projection of it have a finite set of inputs. Here the whole branch is found by taint analysis over the graph, evaluated
in float32 once for each deployed timestep, and replaced by rows:

    row = nearest[clip(timestep[0], 0, num_train - 1)]       [num_train] integers -> one row index, shape [1]
    value = table[row]                                       [rows, ...] -> [1, ...], broadcast over the batch

Values that also depend on a class or a prompt stay in the graph. So the modulation of a transformer (adaLN) is a table
where it depends on the timestep alone (AuraFlow, Wan, LTX, Qwen-Image). Where a class or a pooled text enters (DiT,
SD 3, Flux), the timestep's share of the embedding is a table, the sum and its SiLU stay in float, and the linear layer
behind them, one row an image, is a layer like the others. Those of digits-dit make 0.4 % of the error of `w4a8`. In
float they change no figure beyond its scatter, and add a quarter to the file of `w8a8`, two thirds to that of `w4a8`.

For a timestep outside the table plain onnxruntime takes the nearest row; Mezzotint's runtime refuses it. The time
layers leave the graph, and their quantization error with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import DEFAULT_DOMAINS, Builder, Names, consumers, name_of, remove_dead, replace_use
from mezzotint.compiler.graph.scopes import TABLES_SCOPE
from mezzotint.compiler.graph.topology import time_branch
from mezzotint.compiler.scales.timetable import deployed_rows, nearest_row_of_timestep, step_index
from mezzotint.runtime.signature import Timestep

BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div"})


@dataclass(frozen=True)
class FreezeTime(GraphPass):
    """It has no options. A model in which nothing depends on the timestep alone stays as it is."""

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    gives: ClassVar[frozenset[str]] = frozenset({"frozen"})
    tolerance: ClassVar[float | None] = 1e-4

    def run(self, program: Program, context: Context) -> Program:
        branch = time_branch(program.graph, program.signature)
        frontier = [v for v in branch.frontier if v.dtype is not None and v.dtype.is_floating_point()]
        if not frontier:
            return program.noted("nothing depends on the timestep alone")
        rows = deployed_rows(program)
        tables = _evaluate(program, frontier, rows, context)
        # A value whose open first dimension is not the batch (a flattened [batch * k]) stays in the graph.
        frontier = [v for v in frontier if not _open(v) or tables[name_of(v)].shape[1] == (program.fixed_batch or 1)]
        graph = program.graph
        names = Names(graph)
        build = Builder(graph, names, graph[0], scope=TABLES_SCOPE)
        row = step_index(build, program, nearest_row_of_timestep(program), "time")
        for value in frontier:
            _replace(build, names, program, value, tables[name_of(value)], row)
        before = graph.num_nodes()
        remove_dead(graph)
        size = sum(tables[name_of(v)].nbytes for v in frontier)
        note = (
            f"{len(frontier)} tables of {len(rows)} rows ({size / 1e3:.0f} kB), {before - graph.num_nodes()} nodes gone"
        )
        return replace(program, frozen=rows, note=note)


def _open(value: ir.Value) -> bool:
    return bool(value.shape) and not isinstance((value.shape or [1])[0], int)


def _evaluate(
    program: Program, frontier: list[ir.Value], rows: tuple[Timestep, ...], context: Context
) -> dict[str, npt.NDArray[Any]]:
    """Return the frontier's values at each deployed timestep, `[rows, ...]`."""
    branch = ir.convenience.extract(program.graph, list(program.graph.inputs), [name_of(v) for v in frontier])
    model = ir.Model(branch, ir_version=program.model.ir_version)
    batch = program.fixed_batch or 1
    x = np.zeros((batch, *program.shape), np.float32)
    sizes = {
        name: [d if isinstance(d, int) else 1 for d in list(value.shape or [])[1:]]
        for name, value in program.conditions().items()
    }
    conditions = {
        name: np.zeros([batch, *sizes[name]], value.dtype.numpy())
        for name, value in program.conditions().items()
        if value.dtype is not None
    }
    values: dict[str, list[npt.NDArray[Any]]] = {name_of(v): [] for v in frontier}
    with Executor(model, context.folder, threads=context.threads) as executor:
        for i, t in enumerate(rows):
            for name, array in executor.call(program.signature, x, t, conditions).items():
                values[name].append(array)
            context.progress("freeze_time", i + 1, len(rows))
    return {name: np.stack(arrays) for name, arrays in values.items()}


def _replace(
    build: Builder,
    names: Names,
    program: Program,
    value: ir.Value,
    table: npt.NDArray[Any],
    row: ir.Value,
) -> None:
    """Make the readers of a frontier value read its table's row instead."""
    batched = _open(value)
    stem = name_of(value)
    # The table of a batched value is [rows, 1, ...]: its batch of 1 is dropped, the gathered row has one again.
    data = table[:, 0] if batched else table
    shape = [1, *data.shape[1:]]
    gathered = build.op(
        "Gather",
        [build.constant(f"{stem}_table", data), row],
        f"{stem}_row",
        dtype=value.dtype,
        shape=shape,
        attributes={"axis": 0},
    )
    if not batched:
        axes = build.constant(f"{stem}_axes", np.array([0]))
        gathered = build.op("Squeeze", [gathered, axes], f"{stem}_value", dtype=value.dtype, shape=data.shape[1:])
    full: ir.Value | None = None
    inside = {name_of(v) for v in time_branch(program.graph, program.signature).values}
    for node in consumers(value):
        if all(name_of(out) in inside for out in node.outputs):
            continue
        if not batched or (node.op_type in BROADCASTING and node.domain in DEFAULT_DOMAINS and len(node.inputs) == 2):
            replace_use(node, value, gathered)
        else:
            if full is None:
                full = _expanded(Builder(program.graph, names, node), program, gathered, value)
            replace_use(node, value, full)


def _expanded(build: Builder, program: Program, gathered: ir.Value, value: ir.Value) -> ir.Value:
    """Return the row repeated over the batch, for readers that do not broadcast."""
    sample = next(v for v in program.graph.inputs if name_of(v) == program.signature.sample)
    stem, int64 = name_of(value), ir.DataType.INT64
    sizes = build.op("Shape", [sample], f"{stem}_sizes", dtype=int64, shape=[4])  # `start` and `end` are of opset 15
    first = build.constant(f"{stem}_first", np.array([0]))
    batch = build.op("Gather", [sizes, first], f"{stem}_batch", dtype=int64, shape=[1], attributes={"axis": 0})
    rest = build.constant(f"{stem}_rest", np.ones(len(value.shape or ()) - 1, np.int64))
    shape = build.op("Concat", [batch, rest], f"{stem}_full_shape", dtype=int64, shape=[None], attributes={"axis": 0})
    return build.op("Expand", [gathered, shape], f"{stem}_full", like=value)
