"""reparameterize_norms: every channel fills the same range, the function stays, padding convolutions take no shift."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.stats import Stats
from mezzotint.compiler.errors import NotExact, RecipeError, StatsError
from mezzotint.compiler.graph import nodes as graphs
from mezzotint.compiler.rescaling import sites
from mezzotint.compiler.rescaling.edits import apply_edit
from mezzotint.passes.reparameterize_norms import ReparameterizeNorms
from tests.conftest import Check
from tests.helpers import golden
from tests.helpers.factors import BLOCK, END, factor_program
from tests.helpers.tiny import context_in

SHAPES = {"layer_norm": (4, 4), "group_norm": (2, 4, 4)}
EXTREMES: dict[str, npt.ArrayLike] = {
    "layer_norm": np.array([[-1.0, -1, -8, -10], [1, 5, 8, 22]]),  # widths 2, 6, 16, 32: r = 1/7, 3/7, 8/7, 16/7
    "group_norm": np.array([[-1.0, -9], [3, 9]]),
}
NORM = "n = LayerNormalization <axis = -1> (x, g0, b0)"


def with_extremes(name: str, *calls: npt.ArrayLike) -> Callable[[Program], Program]:
    """A program whose statistics hold these extremes of the channels of one value, call by call."""

    def prepare(program: Program) -> Program:
        channels = {(name, k): np.array(extremes, np.float32) for k, extremes in enumerate(calls)}
        stats = Stats(graphs.digest(program.model), len(calls), len(calls), {}, (), channels)
        return replace(program, stats=stats)

    return prepare


@pytest.mark.parametrize("case", golden.cases("reparameterize_norms"))
def test_golden(check_golden: Check, case: str) -> None:
    prepare = with_extremes("n", EXTREMES[case])
    after = check_golden(ReparameterizeNorms(), case, shape=SHAPES[case], prepare=prepare)
    shifted = {"layer_norm": 1, "group_norm": 0}[case]
    assert after.history[-1].note.startswith(f"1 norms, {shifted} of them shifted")


def measured(program: Program, folder: Path, value: str) -> npt.NDArray[np.float32]:
    """The extremes `[2, C]` of the channels of tokens over some inputs."""
    x = np.random.default_rng(8).standard_normal((16, *program.shape)).astype(np.float32)
    with Executor(program.model, folder, taps=[value], threads=1) as executor:
        rows = executor.call(program.signature, x, 0)[value].reshape(-1, 4)
    return np.stack([rows.min(axis=0), rows.max(axis=0)])


def test_every_channel_fills_the_range_of_all(tmp_path: Path) -> None:
    program = factor_program(f"{BLOCK} {NORM} y = MatMul (n, w0) {END}")
    extremes = measured(program, tmp_path, "n")
    middle = extremes.mean(axis=0)
    halves = [np.stack([middle, extremes[1]]), np.stack([extremes[0], middle])]  # of two calls
    program = with_extremes("n", *halves)(program)
    after = pipeline.run_passes(program, [ReparameterizeNorms()], context_in(tmp_path))
    low, high = measured(after, tmp_path, "n")
    np.testing.assert_allclose(low, low[0], rtol=1e-4)
    np.testing.assert_allclose(high, high[0], rtol=1e-4)
    widths = extremes[1] - extremes[0]
    np.testing.assert_allclose(high[0] - low[0], widths.mean(), rtol=1e-4)
    np.testing.assert_allclose(low[0], (extremes[0] / widths).mean() * widths.mean(), rtol=1e-4)
    assert graphs.counts(after.graph)["Add"] == 1  # the reader had no bias


def test_without_shifts_the_largest_magnitudes_are_equal(tmp_path: Path) -> None:
    program = factor_program(f"{BLOCK} {NORM} y = MatMul (n, w0) {END}")
    program = with_extremes("n", measured(program, tmp_path, "n"))(program)
    after = pipeline.run_passes(program, [ReparameterizeNorms(shifts=False)], context_in(tmp_path))
    largest = np.abs(measured(after, tmp_path, "n")).max(axis=0)
    np.testing.assert_allclose(largest, largest[0], rtol=1e-4)
    assert graphs.counts(after.graph)["Add"] == 0


@pytest.mark.parametrize("extremes", [[[0.0] * 4, [0.0] * 4], [[-1.0, 0, 0, 0], [1.0, 0, 0, 0]]])
def test_channels_that_never_speak(extremes: list[list[float]], tmp_path: Path) -> None:
    program = with_extremes("n", extremes)(factor_program(f"{BLOCK} {NORM} y = MatMul (n, w0) {END}"))
    after = pipeline.run_passes(program, [ReparameterizeNorms(limit=50.0)], context_in(tmp_path))
    assert all(np.isfinite(v.const_value.numpy()).all() for v in after.graph.initializers.values() if v.const_value)


def test_a_shift_that_is_one_percent_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = apply_edit
    monkeypatch.setattr(sites, "apply_edit", lambda g, n, edit, m, a: true(g, n, edit, m, a * 1.01))
    program = with_extremes("n", EXTREMES["layer_norm"])(factor_program(f"{BLOCK} {NORM} y = MatMul (n, w0) {END}"))
    with pytest.raises(NotExact, match="reparameterize_norms changed the function"):
        pipeline.run_passes(program, [ReparameterizeNorms()], context_in(tmp_path))


def test_a_norm_with_another_reader_is_refused_with_the_reason(tmp_path: Path) -> None:
    program = factor_program(f"{BLOCK} {NORM} p = MatMul (n, w0) [late] y = Add (p, n) {END}")
    program = with_extremes("n", EXTREMES["layer_norm"])(program)
    after = pipeline.run_passes(program, [ReparameterizeNorms()], context_in(tmp_path))
    assert "Add 'late' reads 'n', too" in after.refused["n"]
    assert graphs.model_text(after.model) == graphs.model_text(program.model)


def test_statistics_that_are_missing_or_of_another_graph(tmp_path: Path) -> None:
    program = factor_program(f"{BLOCK} {NORM} y = MatMul (n, w0) {END}")
    with pytest.raises(StatsError, match="channels of 'n' were not measured") as missing:
        pipeline.run_passes(
            with_extremes("x", EXTREMES["layer_norm"])(program), [ReparameterizeNorms()], context_in(tmp_path)
        )
    assert "observe.channels=inputs" in str(missing.value)
    other = with_extremes("n", EXTREMES["layer_norm"])(factor_program(f"{BLOCK} y = MatMul (x, w0) {END}"))
    with pytest.raises(StatsError, match="another graph"):
        pipeline.run_passes(replace(program, stats=other.stats), [ReparameterizeNorms()], context_in(tmp_path))


@pytest.mark.parametrize("limit", [1.0, np.inf])
def test_a_limit_that_makes_no_sense(limit: float) -> None:
    with pytest.raises(RecipeError, match=r"reparameterize_norms\.limit"):
        ReparameterizeNorms(limit=limit)
