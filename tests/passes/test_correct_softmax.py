"""correct_softmax: what rounding takes from the probabilities comes back behind the value matmul, on its kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mezzotint.compiler.audit.kernels import FLOAT_KERNELS, INTEGER_KERNELS
from mezzotint.compiler.bundle.writer import save_model
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.channel_means import ChannelMeans
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import model_text, name_of
from mezzotint.compiler.lowering.lower import lower
from mezzotint.passes.correct_bias import CorrectBias
from mezzotint.passes.correct_softmax import CorrectSoftmax
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import make_pass, with_options
from tests.conftest import Check
from tests.helpers.attention import SHARP, attention_program, fidelity
from tests.helpers.tiny import ATTENTIONS, CONVS, LINEARS, SIGNATURE, tiny_program

ROOT = Path(__file__).parents[2]
OLDEST = Path(sys.prefix) / "oldest"  # another onnxruntime, put there by tools/setup_venv.py
BUILD = """
import sys
from pathlib import Path
from mezzotint.runtime.session import open_session
for model in sys.argv[1:]:
    open_session(Path(model), threads=1, optimized=Path(f"{model}.built"))
"""
PLAIN = CorrectSoftmax(steps="mean", heads=False, held_out=0)


def quantized(context: Context, recipe: str = "w8a8", bits: int = 4, settings: dict[str, Any] | None = None) -> Program:
    """Four-bit probabilities: of 16 tokens, most round to 0."""
    options = {"choose_scales.activation_bits": bits, **(settings or {})}
    return pipeline.run_passes(tiny_program(), with_options(RECIPES[recipe], options).passes, context)


def correct(program: Program, context: Context, *steps: Pass) -> Program:
    return pipeline.run_passes(program, steps or [PLAIN], context)


def with_float_graph(program: Program) -> Program:
    return replace(program, float_model=program.model.clone(), frozen=(0, 2, 4))


@pytest.mark.parametrize(("case", "steps"), [("attention", "mean"), ("heads_and_steps", "rows")])
def test_golden(check_golden: Check, monkeypatch: pytest.MonkeyPatch, case: str, steps: str) -> None:
    monkeypatch.setattr(ChannelMeans, "overall", lambda self: np.full((1, self.channels), 0.25))
    rows = np.array([[0.125], [0.25], [0.5]])
    monkeypatch.setattr(ChannelMeans, "by_row", lambda self: np.repeat(rows, self.channels, axis=1))
    step = CorrectSoftmax(steps="rows" if steps == "rows" else "mean", heads=steps == "rows", held_out=0)
    after = check_golden(step, case, prepare=with_float_graph)
    assert after.history[-1].note.startswith("1 softmaxes corrected")


def check_sum(before: Program, after: Program, context: Context, factor: float = 1.0) -> None:
    """(Q(A) + beta) V, computed here from values of the graph before."""
    mix = next(node for node in before.graph if node.name == "mix")
    rounded, values = (name_of(v) for v in mix.inputs)
    x = np.random.default_rng(3).standard_normal((2, 1, 8, 8)).astype(np.float32)
    t = before.deployment.timesteps[1]
    taps = ["weights", rounded, values, "mixed"]
    with Executor(before.model, context.folder, taps=taps, threads=1, level="none") as executor:
        seen = executor.call(SIGNATURE, x, t)
    (beta,) = [v for n, v in after.graph.initializers.items() if n == "mixed_beta"]
    assert beta.const_value is not None
    number = float(beta.const_value.numpy()) * factor
    want = (seen[rounded].astype(np.float64) + number) @ seen[values]
    with Executor(after.model, context.folder, taps=["mixed"], threads=1, level="none") as executor:
        got = executor.call(SIGNATURE, x, t)["mixed"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * number * np.abs(seen[values]).sum(axis=-2).max())


def test_beta_is_added_to_every_probability(context: Context) -> None:
    before = quantized(context)
    after = correct(before, context)
    check_sum(before, after, context)
    with pytest.raises(AssertionError):
        check_sum(before, after, context, factor=1.01)


def test_beta_is_what_a_row_lacks(context: Context) -> None:
    """Rows of 64 probabilities sum to 1; on average those of Q(A) + beta do again, on the calibration latents."""
    before = quantized(context)
    after = correct(before, context)
    beta = after.graph.initializers["mixed_beta"].const_value
    assert beta is not None and beta.size == 1
    lacking = float(after.history[-1].note.split("lacked ")[1].split("%")[0]) / 100
    assert lacking > 0.001
    np.testing.assert_allclose(float(beta.numpy()) * 64, lacking, rtol=1e-2)


def test_many_tokens_show_what_it_gains(context: Context) -> None:
    """8 bits, 256 tokens of which a query reads a few: rows lack 4 %."""
    program = attention_program(SHARP, side=16)
    plain, corrected = (fidelity(program, context, behind=steps, islands=["scores"]) for steps in ((), (PLAIN,)))
    assert corrected > plain + 3


@pytest.mark.parametrize("steps", ["rows", "mean"])
def test_kernels_stay_on_both_versions(context: Context, tmp_path: Path, steps: str) -> None:
    """Both spellings, with the biases corrected too, as the oldest and the newest onnxruntime build them."""
    tables: dict[str, Any] = {"insert_qdq.islands": ["first", "last"]}
    made = []
    for spelling, recipe, options in (
        ("qdq", "w8a8", {}),
        ("integer", "w8a8-steps", tables),
    ):
        program = quantized(context, recipe, 8, options)
        both = (CorrectBias(held_out=0), replace(PLAIN, steps="rows" if steps == "rows" else "mean"))
        after = correct(program, context, *both)
        assert len(after.graph.initializers) > len(program.graph.initializers)
        save_model(lower(after), tmp_path / f"{spelling}.onnx")
        made.append(str(tmp_path / f"{spelling}.onnx"))
    assert OLDEST.is_dir(), "run: make venv"
    for folders in ([], [OLDEST]):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT]))}
        done = subprocess.run(
            [sys.executable, "-c", BUILD, *made], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        for model in made:
            found = [n.op_type for n in onnx.load(f"{model}.built", load_external_data=False).graph.node]
            counted = [sum(op in kernels for op in found) for kernels in (INTEGER_KERNELS, FLOAT_KERNELS)]
            assert counted == [CONVS + LINEARS + ATTENTIONS, 2], model


def test_harm_is_thrown_away(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChannelMeans, "overall", lambda self: np.full((1, self.channels), 1.0))
    program = quantized(context)
    judged = correct(program, context, replace(PLAIN, held_out=2))
    assert "; thrown away: on held-out noise pictures" in judged.history[-1].note
    assert model_text(judged.model) == model_text(program.model)


def test_a_table_has_a_beta_for_each_call(context: Context) -> None:
    after = correct(quantized(context), context, CorrectSoftmax(held_out=0))
    table = after.graph.initializers["softmax_betas_table"].const_value
    assert table is not None and list(table.shape) == [3, 1]
    assert np.ptp(table.numpy()) > 0


def test_what_is_not_there_is_said(context: Context) -> None:
    program = quantized(context, settings={"insert_qdq.islands": ["attention"]})
    assert correct(program, context).history[-1].note == "no softmax is quantized: nothing to correct"
    flat = quantized(context)
    weights = next(v for node in flat.graph for v in node.outputs if v.name == "weights")
    weights.shape = ir.Shape(["tokens", "tokens"])
    assert PLAIN.run(flat, context).note.endswith("; 1 on plain matrices stay")


def test_refusals(context: Context) -> None:
    with pytest.raises(StatsError, match="the float graph to compare with is gone"):
        PLAIN.run(replace(quantized(context), float_model=None), context)
    for options in ({"held_out": -1}, {"steps": "each"}, {"heads": "many"}):
        with pytest.raises(RecipeError, match=f"correct_softmax.{next(iter(options))}"):
            make_pass("correct_softmax", dict(options))
