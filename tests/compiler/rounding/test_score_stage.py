"""What attention makes of errors of its projections: the matrices against the network itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rounding.layer_inputs import Gathered, Inputs, Latents, chosen_latents
from mezzotint.compiler.rounding.score_stage import find_projections, gather_scores
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.clean_qdq import CleanQdq
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.observe import Observe
from mezzotint.passes.round_weights import RoundWeights
from mezzotint.runtime.arrays import Floats
from tests.helpers.attention import CHANNELS, attention_program
from tests.helpers.tiny import context_in, tiny_program

ROLES = {"queries": ("q_w", "scores"), "k_plain": ("k_w", "scores"), "v_plain": ("v_w", "mixed")}


@pytest.fixture
def here(tmp_path: Path) -> Context:
    return context_in(tmp_path, threads=1, samples=1, batch=1)


def quantized(program: Program, here: Context) -> Program:
    steps = (Observe(), ChooseScales("minmax", weight_bits=4, levels=0), InsertQdq(islands=()), CleanQdq())
    return pipeline.run_passes(program, steps, here)


def inputs_of(program: Program, name: str) -> Inputs:
    floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
    return Inputs.of(next(w for w in find_weights(program.graph) if w.name == name), floats, "test")


def matrices(program: Program, here: Context, inputs: Inputs, batches: Sequence[Latents], *, balance: bool) -> Gathered:
    return gather_scores(
        program, here, [inputs], batches, rounded=(), columns=10**6, balance=balance, step=lambda: None
    )


def trace(found: Gathered, inputs: Inputs, rows: Floats) -> float:
    gram, side = found.gram(inputs), found.side(inputs)
    if side is not None:
        return float(np.trace(side[0] @ rows @ gram[0] @ rows.T))
    parts = rows.reshape(len(gram), -1, rows.shape[1])
    return float(np.einsum("hrd,hde,hre->", parts, gram, parts))


def seen(program: Program, here: Context, batch: Latents, tap: str, weight: str, error: Floats) -> Floats:
    """Return a value of the float network whose weight has been moved by an error."""
    model = program.require_float_model().clone()
    value = model.graph.initializers[weight]
    value.const_value = ir.tensor(numpy_of(value) + error)
    with Executor(model, here.folder, taps=[tap], threads=1, level="none") as executor:
        return np.asarray(executor.call(program.signature, batch.x, batch.timestep, {})[tap], np.float32)


@pytest.mark.parametrize("name", ROLES)
def test_the_error_is_that_of_scores_and_of_mixed_values(here: Context, name: str) -> None:
    """For one sample at one call H_I and H_O are exact: the trace is the squared error of S, or of A V."""
    program = quantized(attention_program(), here)
    inputs, (weight, tap) = inputs_of(program, name), ROLES[name]
    (batch,) = chosen_latents(program, here, 1)
    error = 0.01 * np.random.default_rng(3).standard_normal((CHANNELS, CHANNELS)).astype(np.float32)
    moved, exact = (seen(program, here, batch, tap, weight, k * error) for k in (1, 0))
    expected = float(np.square(moved - exact, dtype=np.float64).sum())
    found = matrices(program, here, inputs, [batch], balance=False)
    near = 1e-3 if name == "v_plain" else 0.02  # X of queries and keys is that of the quantized graph
    assert trace(found, inputs, error.T) == pytest.approx(expected, rel=near)


def test_calls_have_the_same_share_with_balance(here: Context) -> None:
    program = quantized(attention_program(), here)
    batch, other = (chosen_latents(program, here, 3)[k] for k in (0, -1))
    louder = replace(other, x=30 * other.x)
    for name in ROLES:
        inputs = inputs_of(program, name)
        error = np.eye(CHANNELS, dtype=np.float32)
        each = [trace(matrices(program, here, inputs, [one], balance=True), inputs, error) for one in (batch, louder)]
        assert 0.2 < each[0] / each[1] < 5
        plain = [trace(matrices(program, here, inputs, [one], balance=False), inputs, error) for one in (batch, louder)]
        assert plain[1] / plain[0] > 20


def test_rounding_lowers_the_error_of_scores(here: Context) -> None:
    program = quantized(attention_program(), here)
    after = {w: pipeline.run_passes(program, [RoundWeights(weighting=w)], here) for w in ("none", "scores")}
    assert after["scores"].history[-1].note.endswith("; 3 by what attention makes of their errors")
    weights = {w: {x.name: x for x in find_weights(p.graph)} for w, p in after.items()}
    batches = chosen_latents(program, here, 4)
    for name in ("queries", "k_plain"):
        inputs = inputs_of(program, name)
        found = matrices(program, here, inputs, batches, balance=True)
        errors = {w: trace(found, inputs, inputs.rows() - weights[w][name].rows()) for w in after}
        assert errors["scores"] <= errors["none"]
    assert np.array_equal(weights["scores"]["out"].rows(), weights["none"]["out"].rows())


def test_a_network_without_such_projections_says_so(here: Context) -> None:
    assert find_projections(tiny_program().graph) == {}
    after = pipeline.run_passes(quantized(tiny_program(), here), [RoundWeights(weighting="scores")], here)
    assert "; 0 by what attention makes of their errors" in after.history[-1].note


def test_what_does_not_go_with_it(here: Context) -> None:
    with pytest.raises(RecipeError, match="the weighting scores does not go with comq"):
        RoundWeights(method="comq", weighting="scores")
    with pytest.raises(RecipeError, match="the weighting scores does not go with levels"):
        RoundWeights(weighting="scores", refits=1)
