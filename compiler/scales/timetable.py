"""Tables over the timestep: how a graph looks up the row of the current call."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.errors import ScheduleError
from mezzotint.runtime.signature import Timestep
from mezzotint.runtime.tables import nearest_rows

from ..core.program import Program
from ..graph.nodes import Builder, is_constant, is_op, name_of, numpy_of
from ..graph.require import inputs, producer


def step_index(build: Builder, program: Program, row_of: npt.NDArray[np.int64], stem: str) -> ir.Value:
    """Add nodes that turn the timestep input (a number or a batch of equal ones, of any type) into a row index `[1]`.

    `row_of` is that of `nearest_row_of_timestep`. A timestep outside of the training schedule is clipped to it.
    """
    timestep = next(v for v in program.graph.inputs if name_of(v) == program.signature.timestep)
    int64, kind = ir.DataType.INT64, timestep.dtype
    # The first one before any arithmetic: the file takes a timestep of any rank (compiler/lowering/any_timestep.py).
    flat = build.constant(f"{stem}_flat_shape", np.array([-1]))
    value = build.op("Reshape", [timestep, flat], f"{stem}_flat", dtype=kind, shape=[None])
    first = build.constant(f"{stem}_first", np.array([0]))
    value = build.op("Gather", [value, first], f"{stem}_one", dtype=kind, shape=[1], attributes={"axis": 0})
    if kind is not None and kind.is_floating_point():
        value = _in_steps(build, program, value, stem)
        if (fine := _fineness(program)) > 1:
            factor = build.constant(f"{stem}_fineness", np.array(fine, kind.numpy()))
            value = build.op("Mul", [value, factor], f"{stem}_fine", like=value)
        value = build.op("Round", [value], f"{stem}_round", like=value)
    if kind != int64:
        value = build.op("Cast", [value], f"{stem}_integer", dtype=int64, shape=[1], attributes={"to": int(int64)})
    last = len(row_of) - 1
    limits = [build.constant(f"{stem}_lowest", np.array(0)), build.constant(f"{stem}_highest", np.array(last))]
    value = build.op("Clip", [value, *limits], f"{stem}_clipped", dtype=int64, shape=[1])
    nearest = build.constant(f"{stem}_nearest_row", row_of)
    return build.op("Gather", [nearest, value], f"{stem}_row", dtype=int64, shape=[1], attributes={"axis": 0})


def _in_steps(build: Builder, program: Program, value: ir.Value, stem: str) -> ir.Value:
    """Return a timestep of floating type, in the unit of the network's input, in training timesteps."""
    signature = program.signature
    if signature.timestep_unit == "steps" or value.dtype is None:
        return value
    dtype, like = value.dtype.numpy(), value
    if signature.timestep_unit == "reversed_fraction":
        one = build.constant(f"{stem}_noise_end", np.array(1, dtype))
        value = build.op("Sub", [one, value], f"{stem}_fraction", like=like)
    count = build.constant(f"{stem}_train_timesteps", np.array(signature.num_train_timesteps, dtype))
    return build.op("Mul", [value, count], f"{stem}_steps", like=like)


def group_of_train(program: Program) -> npt.NDArray[np.int64]:
    """Return the row of the scale tables for each timestep: that of the nearest timestep of the deployed sampler."""
    return group_of_row(program)[nearest_row_of_timestep(program)]


def group_of_row(program: Program) -> npt.NDArray[np.int64]:
    """Return the row of the scale tables for each row of the timestep tables, which are finer."""
    group = dict(zip(program.deployment.timesteps, program.require_plan().groups, strict=True))
    return np.array([group[t] for t in deployed_rows(program)], np.int64)


def deployed_rows(program: Program) -> tuple[Timestep, ...]:
    """Return the timesteps of the tables, in the order of the rows."""
    return tuple(sorted(program.deployment.timesteps))


def nearest_row_of_timestep(program: Program) -> npt.NDArray[np.int64]:
    """Return the nearest row of each whole timestep. A timestep between two of these is rounded before the lookup.

    When two deployed timesteps round to the same one, the map counts halves (quarters, ...) of timesteps.
    """
    fine = _fineness(program)
    rounded = np.rint(np.array(deployed_rows(program)) * fine).astype(np.int64)
    return nearest_rows(rounded.tolist(), program.schedule.last_timestep * fine + 1)


def _fineness(program: Program) -> int:
    """Return the number of entries of the map for one training timestep, so that each deployed one has its own.

    Raises ScheduleError.
    """
    times = np.array(deployed_rows(program))
    for fine in (1, 2, 4, 8, 16, 32, 64):  # 64 is enough for 1000 steps of Karras' sigmas
        if len(np.unique(np.rint(times * fine))) == len(times):
            return fine
    raise ScheduleError(
        f"{program.deployment} calls timesteps that lie closer together than 1/64",
        hint="deploy fewer steps, or other sigmas",
    )


def lookup(
    build: Builder, table: npt.NDArray[np.generic], row: ir.Value, sizes: list[int], stem: str
) -> list[ir.Value]:
    """Add one Gather and one Split; return a row of a table `[rows, sum(sizes)]` in parts `[sizes[i]]`."""
    scalar = build.op(
        "Reshape", [row, build.constant(f"{stem}_scalar", np.array([], np.int64))], f"{stem}_index", like=row, shape=[]
    )
    rows = build.constant(f"{stem}_table", table)
    dtype = rows.dtype
    gathered = build.op(
        "Gather", [rows, scalar], f"{stem}_row", dtype=dtype, shape=[sum(sizes)], attributes={"axis": 0}
    )
    if len(sizes) == 1:
        return [gathered]
    return build.split(gathered, sizes, f"{stem}_part")


def rows_and_index(parameter: ir.Value) -> tuple[npt.NDArray[Any], ir.Value | None]:
    """Return the rows of a scale or zero point, `[groups]` or `[groups, C]` when per channel, and the row index.

    A constant is one row, `[1]` or `[1, C]`, without an index. Raises PassError for nodes that `lookup` does not write.
    """
    table, columns, index = table_part(parameter)
    if index is None:
        constant = numpy_of(table)
        return constant[None] if constant.size > 1 else constant.reshape(1), None
    rows = numpy_of(table)[:, columns]
    return rows[:, 0] if rows.shape[1] == 1 else rows, index


def table_part(parameter: ir.Value) -> tuple[ir.Value, slice, ir.Value | None]:
    """Return the constant that holds a scale or zero point, its columns there, and the row index of a table.

    The nodes are those of `lookup`, Split(Gather(table, Reshape(row))), without the Split when the table has one part.
    Raises PassError for others.
    """
    if is_constant(parameter):
        return parameter, slice(None), None
    node = producer(parameter)
    if is_op(node, "Squeeze"):  # written by compiler/graph/elementwise.py
        (parameter,) = inputs(node, 1)
        node = producer(parameter)
    columns = slice(None)
    if is_op(node, "Split"):
        joined, lengths = inputs(node, 2)
        index, sizes = list(node.outputs).index(parameter), numpy_of(lengths)
        columns = slice(int(sizes[:index].sum()), int(sizes[: index + 1].sum()))
        node = producer(joined)
    table, scalar = inputs(node, 2)
    return table, columns, producer(scalar).inputs[0]
