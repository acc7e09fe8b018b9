"""The pipeline: order check, history, dumps, and what a failing pass leaves behind."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest

from mezzotint.compiler.core import pipeline, snapshot
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Dump, Pass, Recipe
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError, RecipeError
from mezzotint.compiler.graph import nodes as graph
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.lowering.qdq import lower_qdq
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.clean_qdq import CleanQdq
from mezzotint.passes.equalize_weights import EqualizeWeights
from mezzotint.passes.fit_noise import FitNoise
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.lower_norms import LowerNorms
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import make_pass
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.session import open_session
from tests.helpers.tiny import SIGNATURE, tiny_model

W8A8 = RECIPES["w8a8"].passes


@dataclass(frozen=True)
class Breaks(Pass):
    """Fails, leaves an invalid graph behind, or refuses its input."""

    how: str = "raise"

    needs: ClassVar[frozenset[str]] = frozenset({"plan"})

    def run(self, program: Program, context: Context) -> Program:
        if self.how == "raise":
            raise ZeroDivisionError("somewhere deep")
        if self.how == "refuse":
            raise InputError("not this input")
        program.graph[0].outputs[0].name = program.graph[1].outputs[0].name
        return program


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((Observe(),), "observe needs 'normal'"),
        ((Normalize(), ChooseScales()), "choose_scales needs 'stats'"),
        ((Normalize(), Observe(), InsertQdq()), "insert_qdq needs 'plan'"),
        ((Normalize(), Observe(), LowerNorms(), ChooseScales()), "choose_scales needs 'stats'"),
        ((Normalize(), Observe(), ChooseScales(), FreezeTime(), InsertQdq()), "insert_qdq needs 'plan'"),
        ((*W8A8, LowerNorms()), "lower_norms must come before 'qdq'"),
        ((*W8A8, Observe()), "observe must come before 'qdq'"),
        ((*W8A8, InsertQdq()), "insert_qdq must come before 'qdq'"),
        ((Normalize(), FitNoise()), "fit_noise needs 'qdq'"),
        ((CleanQdq(),), "clean_qdq needs 'qdq'"),
    ],
)
def test_an_order_that_cannot_work_is_refused_when_written(passes: tuple[Pass, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe("mine", "", passes)
    assert "mine" in str(caught.value.where)
    assert caught.value.hint


def test_orders_that_work() -> None:
    Recipe("a", "", (Normalize(), LowerNorms(), FreezeTime(), Observe(), ChooseScales(), ChooseScales(), InsertQdq()))
    Recipe("b", "", (*W8A8, FitNoise(), CleanQdq()))
    Recipe("nothing", "", ())


def test_names_and_options() -> None:
    step = InsertQdq(islands=("first", "mid*"))
    assert step.name == "insert_qdq"
    assert step.options() == {"islands": ["first", "mid*"], "lowering": "qdq"}
    assert (FreezeTime().name, FreezeTime().options()) == ("freeze_time", {})


def test_history_and_notes(tiny: Program, context: Context) -> None:
    stages: list[tuple[str, int, int]] = []
    after = pipeline.run_passes(tiny, W8A8, replace(context, progress=lambda *args: stages.append(args)))
    assert [r.name for r in after.history] == [p.name for p in W8A8]
    assert [r.options for r in after.history] == [p.options() for p in W8A8]
    for before, record in zip(after.history, after.history[1:], strict=False):
        assert record.nodes_before == before.nodes_after
    assert after.history[0].nodes_before == tiny_model().graph.num_nodes()
    assert after.history[-1].nodes_after == after.graph.num_nodes()
    assert all(r.seconds > 0 and r.peak_memory_mb > 10 for r in after.history)
    notes = {r.name: r.note for r in after.history}
    assert notes["lower_norms"] == "5 group normalizations lowered"
    assert notes["freeze_time"].startswith("2 tables of 3 rows")
    assert notes["insert_qdq"] == "14 layers quantized, 2 kept in float"
    assert after.note == ""
    assert after.frozen == tuple(sorted(tiny.deployment.timesteps))
    assert stages[0] == ("passes", 0, len(W8A8)) and stages[-1] == ("passes", len(W8A8), len(W8A8))


def test_each_pass_writes_one_debug_line(tiny: Program, context: Context, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="mezzotint"):
        after = pipeline.run_passes(tiny, [Normalize(), LowerNorms()], context)
    assert [record.getMessage() for record in caplog.records] == [
        f"{r.name}: {r.seconds:.3f} s, {r.nodes_before} -> {r.nodes_after} nodes: {r.note}" for r in after.history
    ]


def test_no_pass_changes_what_it_was_given(tiny: Program, context: Context) -> None:
    program = tiny
    for step in (*W8A8, FitNoise()):
        given = [m for m in (program.model, program.float_model) if m is not None]
        texts = [graph.model_text(m) for m in given]
        after = pipeline.run_passes(program, [step], context)
        assert [graph.model_text(m) for m in given] == texts, step.name
        program = after


def test_dumps_can_be_read_and_run(tiny: Program, context: Context, tmp_path: Path) -> None:
    store.adopt(tiny.model, context.folder)
    folder = tmp_path / "dump"
    after = pipeline.run_passes(tiny, W8A8, context, dump=Dump(folder, models=True))
    stems = ["000_imported", *(f"{i + 1:03d}_{p.name}" for i, p in enumerate(W8A8))]
    assert sorted({f.name.split(".")[0] for f in folder.glob("0*")}) == stems
    assert (folder / "000_imported.diff").read_text() == ""
    assert (folder / f"{stems[-1]}.txt").read_text() == graph.model_text(after.model)
    difference = next(folder.glob("*_lower_norms.diff")).read_text()
    assert "-   b1_n1 = GroupNormalization" in difference.replace("[node_10] ", "")
    assert any(line.startswith("+") and "LayerNormalization" in line for line in difference.splitlines())
    x = np.random.default_rng(0).standard_normal((2, *tiny.shape)).astype(np.float32)
    for stem in stems:
        session = open_session(folder / f"{stem}.onnx", threads=2)
        (got,) = session.run(None, {"sample": x, "timestep": np.array([666, 666])})
        assert got.shape == x.shape and np.isfinite(got).all()
    assert [f.name for f in folder.iterdir() if f.suffix == ".data"] == [store.WEIGHTS]
    assert not list(context.folder.glob("0*"))


def test_what_a_pass_makes_of_weights_is_stored_once(tiny: Program, context: Context) -> None:
    """Appended to the weights of the import, so that no session on the graph writes it again."""
    store.adopt(tiny.model, context.folder)
    weights = context.folder / store.WEIGHTS
    before = weights.read_bytes()
    after = pipeline.run_passes(tiny, [Normalize(), EqualizeWeights()], context)
    constants = [value.const_value for value in after.graph.initializers.values()]
    large = [type(tensor).__name__ for tensor in constants if tensor is not None and store.is_large(tensor)]
    assert set(large) == {"ExternalTensor"}
    assert weights.read_bytes()[: len(before)] == before and weights.stat().st_size > len(before)
    with Executor(after.model, context.folder):
        assert not list(context.folder.glob("*.onnx.data"))


def test_dumps_without_models_are_text_only(tiny: Program, context: Context, tmp_path: Path) -> None:
    pipeline.run_passes(tiny, [Normalize()], context, dump=Dump(tmp_path / "dump"))
    names = sorted(f.name for f in (tmp_path / "dump").iterdir())
    assert names == ["000_imported.diff", "000_imported.txt", "001_normalize.diff", "001_normalize.txt"]


@pytest.mark.parametrize(("how", "message"), [("raise", "breaks failed: ZeroDivisionError"), ("invalid", "twice")])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "inline"])
def test_a_failing_pass_leaves_a_reproducer(
    tiny: Program, context: Context, tmp_path: Path, how: str, message: str, stored: bool
) -> None:
    """What it holds can be loaded, and the passes that had not run yet run from there."""
    if stored:
        store.adopt(tiny.model, context.folder)
    folder = tmp_path / "reproducer"
    done, rest = W8A8[:5], W8A8[5:]
    with pytest.raises(PassError, match=message) as caught:
        pipeline.run_passes(tiny, [*done, Breaks(how), *rest], context, reproducer=folder)
    assert str(folder) in str(caught.value.hint)
    names = " -> ".join(p.name for p in done)
    assert names + " -> breaks" in str(caught.value.where)

    program, pending = snapshot.load_program(folder)
    assert [p["pass"] for p in pending] == ["breaks", *(p.name for p in rest)]
    assert [r.name for r in program.history] == [p.name for p in done]
    remaining = [make_pass(p["pass"], p["options"]) for p in pending[1:]]
    elsewhere = replace(context, folder=folder)
    again = pipeline.run_passes(program, remaining, elsewhere)
    straight = pipeline.run_passes(tiny, [*done, *rest], context)
    x = np.random.default_rng(0).standard_normal((2, *tiny.shape)).astype(np.float32)
    found = []
    for finished, where in ((again, folder), (straight, context.folder)):
        with Executor(lower_qdq(finished.model), where, threads=2) as executor:
            found.append(executor.call(SIGNATURE, x, 333)["epsilon"])
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("there", ["a file", "other files", "an earlier one", "no place"])
def test_a_reproducer_replaces_only_an_earlier_one_and_never_the_error(
    tiny: Program, context: Context, tmp_path: Path, there: str
) -> None:
    folder = tmp_path / "reproducer"
    if there == "a file":
        folder.write_text("mine")
    elif there == "other files":
        folder.mkdir()
        for name in ("mine", "program.json"):
            (folder / name).write_text("mine")
    elif there == "an earlier one":
        snapshot.save_program(tiny, folder)
    else:
        (tmp_path / "file").write_text("mine")
        folder = tmp_path / "file" / "reproducer"
    with pytest.raises(PassError, match="breaks failed: ZeroDivisionError") as caught:
        pipeline.run_passes(tiny, [Breaks("raise")], context, reproducer=folder)
    assert ("tools/replay.py" in str(caught.value.hint)) == (there == "an earlier one")
    if there == "an earlier one":
        assert [p["pass"] for p in snapshot.load_program(folder)[1]] == ["breaks"]
    else:
        assert {p.read_text() for p in tmp_path.rglob("*") if p.is_file() and "work" not in p.parts} == {"mine"}


def test_statistics_of_a_saved_program_are_still_those_of_its_graph(
    tiny: Program, context: Context, tmp_path: Path
) -> None:
    """choose_scales compares digests: loading must not change the graph's, whatever moved to other files."""
    store.adopt(tiny.model, context.folder)
    program = pipeline.run_passes(tiny, W8A8[: [p.name for p in W8A8].index("observe") + 1], context)
    snapshot.save_program(program, tmp_path / "saved")
    loaded, _ = snapshot.load_program(tmp_path / "saved")
    assert graph.digest(loaded.model) == graph.digest(program.model)
    pipeline.run_passes(loaded, [ChooseScales()], replace(context, folder=tmp_path / "saved"))


def test_a_refused_input_is_an_answer_and_leaves_no_reproducer(tiny: Program, context: Context, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not this input"):
        pipeline.run_passes(tiny, [Breaks("refuse")], context, reproducer=tmp_path / "reproducer")
    assert not (tmp_path / "reproducer").exists()


def test_the_optimized_names_of_dumps_are_valid_onnx(tiny: Program, context: Context, tmp_path: Path) -> None:
    pipeline.run_passes(tiny, W8A8[:3], context, dump=Dump(tmp_path / "dump", models=True))
    for file in (tmp_path / "dump").glob("*.onnx"):
        onnx.checker.check_model(str(file), full_check=True)
