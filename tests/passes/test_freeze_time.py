"""freeze_time: golden pairs, and the numbers: deployed timesteps exactly, others the nearest row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.normalize import Normalize
from mezzotint.runtime.signature import Images
from tests.conftest import Check
from tests.helpers import golden
from tests.helpers.tiny import SIGNATURE, program_of

CASES = golden.cases("freeze_time")


@pytest.mark.parametrize("case", CASES)
def test_golden(check_golden: Check, case: str) -> None:
    conditions = {"label": np.array([0, 2])} if case == "label" else None
    after = check_golden(FreezeTime(), case, conditions=conditions)
    frozen = case != "unread"
    assert after.frozen == ((0, 2, 4) if frozen else None)
    assert after.history[0].note.startswith("nothing depends") != frozen


def outputs(model: ir.Model, context: Context, timesteps: list[float], shape: tuple[int, ...]) -> Images:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with Executor(model, context.folder, threads=2) as executor:
        return np.stack([executor.call(SIGNATURE, x, t)["epsilon"] for t in timesteps])


@pytest.fixture
def frozen(tiny: Program, context: Context) -> Program:
    return pipeline.run_passes(tiny, [Normalize(), FreezeTime()], context)


def check_same(want: Images, got: Images) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(np.abs(want).max()))


def test_deployed_timesteps_keep_the_numbers(tiny: Program, frozen: Program, context: Context) -> None:
    timesteps = list(tiny.deployment.timesteps)
    want, got = (outputs(m, context, timesteps, (3, 1, 8, 8)) for m in (tiny.model, frozen.model))
    check_same(want, got)
    assert np.abs(want[0] - want[1]).max() > 0.01, "the timestep must matter"
    table = next(v for n, v in frozen.graph.initializers.items() if n.endswith("_table"))
    table.const_value = ir.tensor(numpy_of(table) * np.float32(1.01), name=table.name)
    with pytest.raises(AssertionError):
        check_same(want, outputs(frozen.model, context, timesteps, (3, 1, 8, 8)))


@pytest.mark.parametrize(("asked", "nearest"), [(1, 0), (166, 0), (167, 333), (500, 666), (499, 333), (999, 666)])
def test_other_timesteps_take_the_nearest_row(frozen: Program, context: Context, asked: int, nearest: int) -> None:
    assert frozen.frozen == (0, 333, 666)
    got = outputs(frozen.model, context, [asked, nearest], (2, 1, 8, 8))
    np.testing.assert_array_equal(got[0], got[1])


@pytest.mark.parametrize("asked", [-5, 1000, 123456])
def test_timesteps_outside_training_are_clipped(frozen: Program, context: Context, asked: int) -> None:
    got = outputs(frozen.model, context, [asked, 0 if asked < 0 else 999], (2, 1, 8, 8))
    np.testing.assert_array_equal(got[0], got[1])


def test_the_time_layers_are_gone(tiny: Program, frozen: Program) -> None:
    names = {layer.name for layer in layers(frozen.graph)}
    assert not names & {"time_1", "time_2", "b1_time", "b2_time"}
    assert len(names) == len(list(layers(frozen.graph)))
    tables = {n: v.shape for n, v in frozen.graph.initializers.items() if n.endswith("_table")}
    assert {n: list(s or []) for n, s in tables.items()} == {"b1_tc_table": [3, 16, 1, 1], "b2_tc_table": [3, 16, 1, 1]}


def test_more_steps_than_one_row_each(tiny: Program, context: Context) -> None:
    """A timestep that occurs twice in the trajectory has one row."""
    twice = replace(tiny, deployment=replace(tiny.deployment, calls=(666, 333, 333)))
    assert pipeline.run_passes(twice, [Normalize(), FreezeTime()], context).frozen == (333, 666)


@pytest.mark.parametrize("opset", [13, 14, 17, 21])
@pytest.mark.parametrize("timestep", ["int64[batch]", "int32[batch]", "float[batch]"])
def test_every_opset_has_what_the_tables_need(context: Context, opset: int, timestep: str) -> None:
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g (float[batch,1,8,8] sample, {timestep} timestep) => (float[batch,1,8,9] epsilon)
    <float half = {{0.5}}, int64[3] axes = {{1, 2, 3}}, int64[4] wide = {{1, 1, 8, 1}}>
    {{
        number = Cast <to = 1> (timestep)
        angle = Mul (number, half)
        wave = Sin (angle)
        column = Unsqueeze (wave, axes)
        stripe = Expand (column, wide)
        epsilon = Concat <axis = 3> (sample, stripe)
    }}""")
    program = pipeline.run_passes(program_of(model), [Normalize(), FreezeTime()], context)
    timesteps = list(program.deployment.timesteps)
    shape = (2, 1, 8, 8)
    check_same(outputs(model, context, timesteps, shape), outputs(program.model, context, timesteps, shape))


def test_a_time_map_of_the_pictures_size_fits_other_sizes_too(context: Context) -> None:
    """What takes its size from the sample must not be frozen at the size of the calibration."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,1,height,width] sample, int64[batch] timestep) => (float[batch,1,height,width] epsilon)
    <float half = {0.5}, int64[3] axes = {1, 2, 3}>
    {
        number = Cast <to = 1> (timestep)
        angle = Mul (number, half)
        wave = Sin (angle)
        column = Unsqueeze (wave, axes)
        sizes = Shape (sample)
        map = Expand (column, sizes)
        product = Mul (sample, map)
        epsilon = Add (product, map)
    }""")
    program = pipeline.run_passes(program_of(model), [Normalize(), FreezeTime()], context)
    for shape in ((2, 1, 8, 8), (2, 1, 6, 10)):
        check_same(outputs(model, context, [333], shape), outputs(program.model, context, [333], shape))
