"""shift_inputs: the function stays, channels lie around zero or are spread, and norms take the shift themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import Format, dequantize, quantize, scale_for_range
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import counts, name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.passes.observe import Observe
from mezzotint.passes.shift_inputs import ShiftInputs
from tests.helpers.factors import BLOCK, END, factor_program, outputs
from tests.helpers.tiny import context_in

NORM = f"{BLOCK} n = LayerNormalization <axis = -1> (x, g0, b0) y = MatMul (n, w0) {END}"
BARE = f"{BLOCK} n = Sigmoid (x) p = MatMul (n, w0) q = MatMul (n, w1) y = Add (p, q) {END}"


def run(body: str, folder: Path, **options: Any) -> tuple[Program, Program]:
    context = context_in(folder)
    observed = pipeline.run_passes(factor_program(body), [Observe(channels="inputs")], context)
    return observed, pipeline.run_passes(observed, [ShiftInputs(**options)], context)


def inputs(program: Program, folder: Path) -> npt.NDArray[np.float32]:
    """The input of the first layer over the calibration's latents, `[numbers, C]`."""
    tap = name_of(next(iter(layers(program.graph))).activations[0])
    x = np.random.default_rng(0).standard_normal((64, *program.shape)).astype(np.float32)
    with Executor(program.model, folder, taps=[tap], threads=1) as executor:
        seen = executor.call(program.signature, x, 0)[tap]
    return np.asarray(seen.reshape(-1, 4))


@pytest.mark.parametrize(("body", "adds"), [(NORM, 0), (BARE, 1)], ids=["norm", "bare"])
@pytest.mark.parametrize("method", ["center", "noise"])
def test_the_function_stays_and_norms_take_the_shift(tmp_path: Path, body: str, adds: int, method: Any) -> None:
    before, after = run(body, tmp_path, method=method, amplitudes=(1.0,))
    np.testing.assert_allclose(outputs(after, tmp_path), outputs(before, tmp_path), rtol=1e-4, atol=1e-4)
    assert counts(after.graph)["Add"] - counts(before.graph)["Add"] == adds + (2 if adds else 1)  # and the biases
    moved = inputs(after, tmp_path) - inputs(before, tmp_path)
    assert np.ptp(moved, axis=0).max() < 1e-5 and np.abs(moved).max() > 1e-3


def test_channels_lie_around_zero(tmp_path: Path) -> None:
    _, after = run(BARE, tmp_path, method="center")
    extremes = pipeline.run_passes(after, [Observe(channels="inputs")], context_in(tmp_path))
    low, high = next(iter(extremes.require_stats().channels.values()))
    np.testing.assert_allclose(low, -high, atol=1e-4)
    stayed, _ = run(BARE, tmp_path)
    _, exact = run(BARE, tmp_path, exact_places=True)
    np.testing.assert_array_equal(inputs(exact, tmp_path), inputs(stayed, tmp_path))


def test_noise_lowers_the_error_of_numbers_at_one_place(tmp_path: Path) -> None:
    lumped = f"{BLOCK} r = Relu (x) s = Mul (r, r) c = Mul (s, s) n = Sigmoid (c) y = MatMul (n, w0) {END}"
    before, after = run(lumped, tmp_path, method="noise", bits=3)
    assert after.history[-1].note == "1 of 1 inputs shifted, 1 of them at run time"

    def error(rows: npt.NDArray[np.float32]) -> float:
        scale, zero = scale_for_range(rows.min(), rows.max(), Format(3))
        return float(np.square(dequantize(quantize(rows, scale, zero, Format(3)), scale, zero) - rows).mean())

    assert error(inputs(after, tmp_path)) < error(inputs(before, tmp_path))


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="amplitudes is"):
        ShiftInputs(amplitudes=(-1.0,))
    plain = pipeline.run_passes(factor_program(NORM), [Observe()], context_in(tmp_path))
    with pytest.raises(StatsError, match="not measured by channel"):
        pipeline.run_passes(plain, [ShiftInputs()], context_in(tmp_path))
