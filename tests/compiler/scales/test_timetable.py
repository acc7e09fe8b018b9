"""Tables over the timestep: the nodes find the row that numpy finds, for every kind of timestep input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Plan, Program
from mezzotint.compiler.graph.nodes import Builder, Names, name_of
from mezzotint.compiler.scales.timetable import (
    deployed_rows,
    group_of_train,
    lookup,
    nearest_row_of_timestep,
    rows_and_index,
    step_index,
)
from mezzotint.runtime.errors import ScheduleError
from tests.helpers.tiny import program_of

DEPLOYED = (666, 333, 0)  # in the order of the calls
GROUPS = (0, 1, 1)
KINDS = ["int64", "int64[1]", "int64[batch]", "int32[batch]", "float", "float[batch]"]
TABLE = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
Numbers = npt.NDArray[np.float32]


def program_with(timestep: str) -> Program:
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,1,8,8] sample, {timestep} timestep) => (float[batch,1,8,8] epsilon)
    {{ epsilon = Identity (sample) }}""")
    program = replace(program_of(model), plan=Plan(groups=GROUPS))
    assert program.deployment.timesteps == DEPLOYED
    return program


def looked_up(
    program: Program, table: Numbers, sizes: list[int], asked: list[float], context: Context, batch: int = 3
) -> list[list[Numbers]]:
    """The parts of the row that onnxruntime finds for each timestep."""
    build = Builder(program.graph, Names(program.graph), program.graph[0])
    row = step_index(build, program, group_of_train(program), "group")
    parts = lookup(build, table, row, sizes, "table")
    time = program.graph.inputs[1]
    assert time.dtype is not None and time.shape is not None
    shape = [d if isinstance(d, int) else batch for d in time.shape]
    x = np.zeros((batch, 1, 8, 8), np.float32)
    names = [name_of(part) for part in parts]
    found = []
    with Executor(program.model, context.folder, taps=names, threads=2) as executor:
        for t in asked:
            outputs = executor.run({"sample": x, "timestep": np.full(shape, t, time.dtype.numpy())})
            found.append([outputs[name] for name in names])
    return found


def check_rows(found: list[list[Numbers]], rows: list[int]) -> None:
    for parts, row in zip(found, rows, strict=True):
        assert [part.shape for part in parts] == [(1,), (2,)]
        np.testing.assert_allclose(np.concatenate(parts), TABLE[row], rtol=1e-6)


# 499 is nearer to 333 than to 666, 500 is not; outside of the training schedule the end of it counts.
ASKED = {666: 0, 333: 1, 0: 1, 1: 1, 499: 1, 500: 0, 999: 0, 1000: 0, 123456: 0, -5: 1}


@pytest.mark.parametrize("kind", KINDS)
def test_every_timestep_finds_its_row(kind: str, context: Context) -> None:
    found = looked_up(program_with(kind), TABLE, [1, 2], list(ASKED), context)
    check_rows(found, list(ASKED.values()))
    with pytest.raises(AssertionError):
        check_rows(found, [1 - row for row in ASKED.values()])


@pytest.mark.parametrize("kind", ["int64[batch]", "float[batch]"])
def test_a_table_that_is_one_percent_off_is_seen(kind: str, context: Context) -> None:
    found = looked_up(program_with(kind), (TABLE * 1.01).astype(np.float32), [1, 2], list(ASKED), context)
    with pytest.raises(AssertionError):
        check_rows(found, list(ASKED.values()))


def test_a_table_whose_rows_are_shifted_is_seen(context: Context) -> None:
    found = looked_up(program_with("int64[batch]"), np.roll(TABLE, 1, axis=0), [1, 2], list(ASKED), context)
    with pytest.raises(AssertionError):
        check_rows(found, list(ASKED.values()))


def test_timesteps_between_two_numbers_are_rounded(context: Context) -> None:
    asked = [499.4, 499.6, 332.7]
    check_rows(looked_up(program_with("float[batch]"), TABLE, [1, 2], asked, context), [1, 0, 1])


def between(*calls: float) -> Program:
    """Deployed at timesteps between training timesteps, each with a row of its own."""
    program = program_with("float[batch]")
    deployment = replace(program.deployment, calls=calls)
    return replace(program, deployment=deployment, plan=Plan(groups=tuple(range(len(calls)))))


def check_own_rows(program: Program, context: Context, shift: int = 0) -> None:
    calls = program.deployment.calls
    table = np.arange(3.0 * len(calls), dtype=np.float32).reshape(-1, 3)
    found = looked_up(program, np.roll(table, shift, axis=0), [1, 2], list(calls), context)
    np.testing.assert_array_equal(np.stack([np.concatenate(parts) for parts in found]), table)


@pytest.mark.parametrize(
    "calls",
    [(998.6, 332.5, 0.25), (999.0, 1.4, 0.75, 0.25, 0.0), (700.51, 700.49, 700.4), (5.0, 4.96875, 0.015625)],
)
def test_timesteps_that_round_to_the_same_have_rows_of_their_own(calls: tuple[float, ...], context: Context) -> None:
    """Karras' sigmas have several timesteps below 1."""
    check_own_rows(between(*calls), context)
    with pytest.raises(AssertionError):
        check_own_rows(between(*calls), context, shift=1)


def test_whole_timesteps_are_looked_up_as_they_are() -> None:
    assert len(nearest_row_of_timestep(program_with("int64"))) == 1000
    assert len(nearest_row_of_timestep(between(998.6, 332.5, 0.2))) == 1000
    assert len(nearest_row_of_timestep(between(998.6, 0.75, 0.6))) == 2 * 999 + 1
    with pytest.raises(ScheduleError, match="closer together than 1/64"):
        nearest_row_of_timestep(between(998.6, 0.75, 0.751))


@pytest.mark.parametrize("sizes", [[3], [1, 1, 1], [2, 1]])
def test_a_row_is_cut_as_asked(sizes: list[int], context: Context) -> None:
    (parts,) = looked_up(program_with("int64"), TABLE, sizes, [333], context)
    assert [part.shape for part in parts] == [(n,) for n in sizes]
    np.testing.assert_array_equal(np.concatenate(parts), TABLE[1])


def test_tables_may_hold_integers(context: Context) -> None:
    table = np.array([[7, -8], [9, 10]], np.int32)
    program = program_with("int64")
    build = Builder(program.graph, Names(program.graph), program.graph[0])
    parts = lookup(build, table, step_index(build, program, group_of_train(program), "group"), [1, 1], "biases")
    assert [p.dtype for p in parts] == [ir.DataType.INT32] * 2


def test_one_lookup_is_one_gather_and_one_split(context: Context) -> None:
    program = program_with("int64[batch]")
    looked_up(program, TABLE, [1, 1, 1], [0], context)
    stems = [node.op_type for node in program.graph if (node.name or "").startswith("table")]
    assert stems == ["Reshape", "Gather", "Split"]


def check_groups(program: Program, got: npt.NDArray[np.int64]) -> None:
    """By the definition: the group of the nearest deployed timestep, the smaller one of two that are as near."""
    assert program.plan is not None
    group = dict(zip(program.deployment.timesteps, program.plan.groups, strict=True))
    assert len(got) == program.schedule.num_train_timesteps
    want = [group[min(sorted(group), key=lambda d: abs(d - t))] for t in range(len(got))]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("groups", [(0, 1, 1), (0, 1, 2), (0, 0, 0)])
def test_the_group_of_each_training_timestep(groups: tuple[int, ...]) -> None:
    program = replace(program_with("int64"), plan=Plan(groups=groups))
    got = group_of_train(program)
    check_groups(program, got)
    if len(set(groups)) > 1:
        with pytest.raises(AssertionError):
            check_groups(program, np.roll(got, 10))


def test_a_timestep_that_is_called_twice_has_one_row() -> None:
    program = program_with("int64")
    twice = replace(program, deployment=replace(program.deployment, calls=(666, 333, 333)), plan=Plan(groups=(0, 1)))
    assert deployed_rows(twice) == (333, 666)
    assert deployed_rows(program) == (0, 333, 666)
    np.testing.assert_array_equal(group_of_train(twice)[[0, 499, 500, 999]], [1, 1, 0, 0])


def check_found(part: ir.Value, want: npt.NDArray[np.generic], row: ir.Value | None) -> None:
    found, index = rows_and_index(part)
    np.testing.assert_array_equal(found, want)
    assert found.dtype == want.dtype
    assert index is row


def test_rows_are_found_behind_a_lookup() -> None:
    """A part of one column is `[rows]`, a wider one, of a scale for each channel, `[rows, C]`."""
    program = program_with("int64[batch]")
    build = Builder(program.graph, Names(program.graph), program.graph[0])
    row = step_index(build, program, group_of_train(program), "group")
    one, two = lookup(build, TABLE, row, [1, 2], "table")
    check_found(one, TABLE[:, 0], row)
    check_found(two, TABLE[:, 1:], row)
    with pytest.raises(AssertionError):
        check_found(two, TABLE[:, 1:] * np.float32(1.01), row)
    with pytest.raises(AssertionError):
        check_found(two, TABLE[:, :2], row)
    (alone,) = lookup(build, TABLE, row, [3], "alone")
    check_found(alone, TABLE, row)
    (narrow,) = lookup(build, TABLE[:, :1].astype(np.uint8), row, [1], "narrow")
    check_found(narrow, TABLE[:, 0].astype(np.uint8), row)


@pytest.mark.parametrize(("constant", "rows"), [(3, [3]), ([3], [3]), ([3, 4], [[3, 4]])])
def test_a_constant_is_one_row(constant: npt.ArrayLike, rows: npt.ArrayLike) -> None:
    program = program_with("int64[batch]")
    build = Builder(program.graph, Names(program.graph), program.graph[0])
    check_found(build.constant("scale", np.asarray(constant, np.float32)), np.asarray(rows, np.float32), None)
