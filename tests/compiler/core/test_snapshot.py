"""A program as a folder: what was known before is known after."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline, snapshot
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import UINT8
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.graph import nodes as graph
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from tests.helpers.tiny import SIGNATURE


@pytest.fixture(params=["stored", "inline"])
def finished(request: pytest.FixtureRequest, tiny: Program, context: Context) -> Program:
    """After every pass there is, with statistics, plan, float model and correction."""
    if request.param == "stored":
        store.adopt(tiny.model, context.folder)
    program = pipeline.run_passes(tiny, RECIPES["ptqd-w8a8"].passes, context)
    assert program.plan is not None
    extra = {Site("start", "b1_conv1"): Quantizer(UINT8, np.array(0.5, np.float32), np.array(3, np.uint8), "test")}
    plan = Plan({**program.plan.quantizers, **extra}, program.plan.islands)
    program = replace(program, refused={"start": "an Add reads it, too"}, widths={"down": 4})
    return replace(program, plan=plan, allocation=(4, 0, 2))


@pytest.fixture
def loaded(finished: Program, tmp_path: Path) -> Program:
    snapshot.save_program(finished, tmp_path / "saved", [{"pass": "clean_qdq", "options": {}}])
    program, pending = snapshot.load_program(tmp_path / "saved")
    assert pending == [{"pass": "clean_qdq", "options": {}}]
    return program


def test_facts(finished: Program, loaded: Program) -> None:
    for name in ("signature", "deployment", "shape", "source", "frozen", "lowering", "allocation", "refused", "widths"):
        assert getattr(loaded, name) == getattr(finished, name), name
    assert loaded.schedule.digest() == finished.schedule.digest()
    for got, want in zip(loaded.history, finished.history, strict=True):
        assert got.entry() == want.entry()


def test_graphs(finished: Program, loaded: Program, context: Context, tmp_path: Path) -> None:
    assert finished.float_model is not None and loaded.float_model is not None
    x = np.random.default_rng(0).standard_normal((2, *finished.shape)).astype(np.float32)
    for want, got in ((finished.model, loaded.model), (finished.float_model, loaded.float_model)):
        assert graph.model_text(got) == graph.model_text(want)
        assert graph.digest(got) == graph.digest(want)
        with Executor(want, context.folder, threads=2) as a, Executor(got, tmp_path / "saved", threads=2) as b:
            outputs = [e.call(SIGNATURE, x, 333)["epsilon"] for e in (a, b)]
        np.testing.assert_array_equal(outputs[0], outputs[1])


def test_saving_what_was_loaded_leaves_the_first_folder_alone(loaded: Program, tmp_path: Path) -> None:
    before = {f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir()}
    snapshot.save_program(loaded, tmp_path / "second", [{"pass": "clean_qdq", "options": {}}])
    assert {f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir()} == before
    shutil.rmtree(tmp_path / "saved")
    again, _ = snapshot.load_program(tmp_path / "second")
    x = np.zeros((1, *again.shape), np.float32)
    with Executor(again.model, tmp_path / "second", threads=2) as executor:
        assert np.isfinite(executor.call(SIGNATURE, x, 333)["epsilon"]).all()


def test_saving_a_program_where_it_came_from(loaded: Program, tmp_path: Path) -> None:
    want = graph.digest(loaded.model)
    added = np.arange(1024, dtype=np.float32)
    value = ir.Value(name="added", const_value=ir.tensor(added, name="added"))
    loaded.graph.register_initializer(value)
    snapshot.save_program(loaded, tmp_path / "saved")
    again, _ = snapshot.load_program(tmp_path / "saved")
    np.testing.assert_array_equal(numpy_of(again.graph.initializers["added"]), added)
    del again.graph.initializers["added"]
    assert graph.digest(again.model) == want


def check_stats(want: Program, got: Program) -> None:
    assert want.stats is not None and got.stats is not None
    assert (want.stats.digest, want.stats.groups, want.stats.calls) == (
        got.stats.digest,
        got.stats.groups,
        got.stats.calls,
    )
    assert want.stats.timesteps == got.stats.timesteps
    assert want.stats.summaries.keys() == got.stats.summaries.keys()
    for key, summary in want.stats.summaries.items():
        other = got.stats.summaries[key]
        for name in ("count", "low", "high", "total", "square"):
            assert getattr(summary, name) == getattr(other, name)
        np.testing.assert_array_equal(summary.histogram, other.histogram)


def test_statistics(finished: Program, loaded: Program) -> None:
    check_stats(finished, loaded)
    assert loaded.stats is not None
    key = next(iter(loaded.stats.summaries))
    off = replace(loaded.stats.summaries[key], total=loaded.stats.summaries[key].total * 1.01)
    planted = replace(loaded, stats=replace(loaded.stats, summaries={**loaded.stats.summaries, key: off}))
    with pytest.raises(AssertionError):
        check_stats(finished, planted)


def check_plan(want: Program, got: Program) -> None:
    assert want.plan is not None and got.plan is not None
    assert want.plan.islands == got.plan.islands
    assert want.plan.groups == got.plan.groups
    assert list(want.plan.quantizers) == list(got.plan.quantizers)
    for site, q in want.plan.quantizers.items():
        other = got.plan.quantizers[site]
        assert (q.format, q.axis, q.by, q.table) == (other.format, other.axis, other.by, other.table)
        for a, b in ((q.scale, other.scale), (q.zero_point, other.zero_point)):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            np.testing.assert_array_equal(a, b)


def test_the_plan(finished: Program, loaded: Program) -> None:
    check_plan(finished, loaded)
    assert loaded.plan is not None
    site, quantizer = next(iter(loaded.plan.quantizers.items()))
    off = replace(quantizer, scale=(quantizer.scale * np.float32(1.01)).astype(np.float32))
    with pytest.raises(AssertionError):
        check_plan(finished, replace(loaded, plan=Plan({**loaded.plan.quantizers, site: off}, loaded.plan.islands)))


def check_channels(want: Program, got: Program) -> None:
    assert want.stats is not None and got.stats is not None and want.stats.channels
    assert list(got.stats.channels) == list(want.stats.channels)
    for key, extremes in want.stats.channels.items():
        assert got.stats.channels[key].dtype == extremes.dtype
        np.testing.assert_array_equal(got.stats.channels[key], extremes)


def check_squares(want: Program, got: Program) -> None:
    assert want.stats is not None and got.stats is not None and want.stats.squares
    assert (got.stats.axes, list(got.stats.squares)) == (want.stats.axes, list(want.stats.squares))
    for key, sums in want.stats.squares.items():
        assert got.stats.squares[key].dtype == sums.dtype
        np.testing.assert_array_equal(got.stats.squares[key], sums)


def test_squares_of_channels(tiny: Program, context: Context, tmp_path: Path) -> None:
    program = pipeline.run_passes(tiny, [Normalize(), Observe(channels="all")], context)
    snapshot.save_program(program, tmp_path / "saved")
    loaded, _ = snapshot.load_program(tmp_path / "saved")
    check_channels(program, loaded)
    check_squares(program, loaded)
    assert loaded.stats is not None
    key, sums = next(iter(loaded.stats.squares.items()))
    planted = replace(loaded.stats, squares={**loaded.stats.squares, key: sums * 1.01})
    with pytest.raises(AssertionError):
        check_squares(program, replace(loaded, stats=planted))


def test_tables_groups_and_lowering(tiny: Program, context: Context, tmp_path: Path) -> None:
    program = pipeline.run_passes(tiny, RECIPES["w8a8-steps"].passes, context)
    assert program.plan is not None
    assert program.lowering == "integer"
    assert len(program.plan.groups) == len(tiny.deployment.timesteps)
    assert any(q.table for q in program.plan.quantizers.values())
    assert any(q.table and q.axis == 1 and q.scale.ndim == 2 for q in program.plan.quantizers.values())
    snapshot.save_program(program, tmp_path / "saved")
    loaded, _ = snapshot.load_program(tmp_path / "saved")
    test_facts(program, loaded)
    check_plan(program, loaded)
    check_channels(program, loaded)
    assert loaded.stats is not None
    key, extremes = next(iter(loaded.stats.channels.items()))
    off = {**loaded.stats.channels, key: extremes * np.float32(1.01)}
    with pytest.raises(AssertionError):
        check_channels(program, replace(loaded, stats=replace(loaded.stats, channels=off)))
    assert loaded.plan is not None
    tables = {site: replace(q, table=False) for site, q in loaded.plan.quantizers.items()}
    for planted in (replace(loaded.plan, groups=(0, 0, 0)), replace(loaded.plan, quantizers=tables)):
        with pytest.raises(AssertionError):
            check_plan(program, replace(loaded, plan=planted))


def test_the_correction(finished: Program, loaded: Program) -> None:
    assert finished.correction is not None and loaded.correction is not None
    for name in ("stages", "scale", "shift", "excess", "spread"):
        np.testing.assert_array_equal(getattr(loaded.correction, name), getattr(finished.correction, name))
    assert loaded.correction.deployment == finished.correction.deployment
    assert loaded.correction.form == finished.correction.form
    assert loaded.noise_report == finished.noise_report != {}


def test_a_bare_program(tiny: Program, tmp_path: Path) -> None:
    snapshot.save_program(tiny, tmp_path / "saved")
    program, pending = snapshot.load_program(tmp_path / "saved")
    assert pending == []
    assert (program.stats, program.plan, program.correction, program.frozen, program.float_model) == (None,) * 5
    assert graph.model_text(program.model) == graph.model_text(tiny.model)


def test_saving_twice_to_one_folder_keeps_the_last(finished: Program, tmp_path: Path) -> None:
    snapshot.save_program(finished, tmp_path / "saved")
    snapshot.save_program(replace(finished, frozen=(1, 2)), tmp_path / "saved")
    assert snapshot.load_program(tmp_path / "saved")[0].frozen == (1, 2)


@pytest.mark.parametrize("damage", ["missing", "empty", "not json", "no graph"])
def test_folders_that_hold_no_program(tiny: Program, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "saved"
    if damage != "missing":
        snapshot.save_program(tiny, folder)
    if damage == "empty":
        (folder / "program.json").unlink()
    if damage == "not json":
        (folder / "program.json").write_text("{")
    if damage == "no graph":
        (folder / "program.onnx").unlink()
    with pytest.raises(ModelError, match="no saved program") as caught:
        snapshot.load_program(folder)
    assert caught.value.where == str(folder)
