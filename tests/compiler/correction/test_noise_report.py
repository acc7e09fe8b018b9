"""The noise report: normal residuals pass, others do not, and correlations are found."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.compiler.correction.noise_report import SUBSET, Residuals, chosen_values, noise_report
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.noise_fit import NoiseFit, StateFit
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Images

SCHEDULE = Schedule.named("ddpm-linear")
DEPLOYMENT = Deployment.of(SCHEDULE, "ddim", 4, 1.0)
STEPS = DEPLOYMENT.solver(SCHEDULE).steps
SHAPE = (8, 2, 16, 16)


def nothing_to_correct() -> Correction:
    n = len(STEPS)
    zeros = np.zeros(n)
    stages = np.zeros(n, np.int64)
    return Correction(DEPLOYMENT, "epsilon", "ptqd", stages, np.ones(n), np.zeros((n, 2)), zeros, zeros.copy())


def figures(error: npt.NDArray[Any], signal: Images | None = None, batches: int = 5, seed: int = 0) -> dict[str, Any]:
    """Of an error that comes in batches, at call 1."""
    residuals = Residuals(seed)
    wanted = initial_noise(1, (batches * SHAPE[0], *SHAPE[1:])) if signal is None else signal
    for w, e in zip(np.split(wanted, batches), np.split(error.astype(np.float32), batches), strict=True):
        add(residuals, 1, w, w + e)
    return residuals.figures(1, nothing_to_correct())


def add(residuals: Residuals, call: int, w: Images, q: Images) -> None:
    chosen = residuals.choose(call, w.size)
    if len(chosen):
        residuals.add(call, chosen_values(w, q, chosen, 1))


def whole_shape(batches: int = 5) -> tuple[int, ...]:
    return (batches * SHAPE[0], *SHAPE[1:])


@pytest.mark.parametrize("seed", range(3))
def test_gaussian_residuals_pass_and_laplace_ones_do_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    normal = figures(rng.normal(scale=0.1, size=whole_shape()))
    assert normal["normal_p"] > 0.01
    assert abs(normal["skewness"]) < 0.2
    assert abs(normal["kurtosis"]) < 0.4
    laplace = figures(rng.laplace(scale=0.1, size=whole_shape()))
    assert laplace["normal_p"] < 1e-6
    assert laplace["kurtosis"] == pytest.approx(3.0, abs=1.5)
    skewed = figures(rng.exponential(scale=0.1, size=whole_shape()))
    assert skewed["normal_p"] < 1e-6
    assert skewed["skewness"] == pytest.approx(2.0, abs=0.5)


def test_correlations_with_the_signal_are_found() -> None:
    rng = np.random.default_rng(3)
    signal = initial_noise(1, whole_shape())
    free = rng.normal(size=whole_shape())
    independent = figures(free, signal)
    assert abs(independent["correlation"]) < 0.07
    assert abs(independent["magnitude_correlation"]) < 0.07
    linear = figures(0.5 * signal + free, signal)
    assert linear["correlation"] == pytest.approx(0.5 / np.hypot(0.5, 1), abs=0.05)
    # An error that is larger where the signal is, of either sign.
    scaled = figures(free * np.abs(signal), signal)
    assert abs(scaled["correlation"]) < 0.1
    assert scaled["magnitude_correlation"] > 0.3


@pytest.mark.parametrize("kind", ["none", "constant", "rounding"])
def test_an_error_that_is_none_has_no_figures(kind: str) -> None:
    """Rounding in float32 is not quantization noise."""
    signal = initial_noise(1, whole_shape())
    error = {"none": 0 * signal, "constant": np.full_like(signal, 0.25), "rounding": np.float32(1e-7) * signal}[kind]
    assert set(figures(error, signal).values()) == {None}
    assert None not in figures(error + 0.01 * initial_noise(2, whole_shape()), signal).values()


def test_subsets_are_bounded_drawn_from_all_batches_and_seeded() -> None:
    """The first batches alone would be the noisiest images of the calibration."""
    residuals = Residuals(0)
    sizes = []
    for i in range(8):
        w = np.full(SHAPE, i, np.float32)
        add(residuals, 1, w, w)
        sizes.append(sum(part.shape[1] for part in residuals._pairs[1]))
    assert sizes[-1] == SUBSET
    assert len({float(part[0, 0]) for part in residuals._pairs[1]}) >= 4
    error = np.random.default_rng(5).laplace(size=whole_shape())
    assert figures(error) == figures(error)
    assert figures(error) != figures(error, seed=1)


def test_few_values_are_no_test() -> None:
    residuals = Residuals(0)
    w = initial_noise(1, (1, 2, 3, 3))
    add(residuals, 0, w, w + 0.1 * initial_noise(2, w.shape))
    assert residuals.figures(0, nothing_to_correct())["normal_p"] is None


def test_figures_are_of_what_the_correction_leaves() -> None:
    """Each value by the shift of its own channel."""
    residuals, w = Residuals(0), initial_noise(1, whole_shape())
    shift = np.array([0.2, -0.1])
    add(residuals, 1, w, np.float32(1.1) * w + shift.astype(np.float32)[:, None, None])
    plain = nothing_to_correct()
    shifts = np.tile(shift / 1.1, (len(STEPS), 1))
    exact = replace(plain, scale=np.full(len(STEPS), 1 / 1.1), shift=shifts)
    assert set(residuals.figures(1, exact).values()) == {None}
    for wrong in (plain, replace(exact, shift=shifts[:, ::-1]), replace(exact, scale=plain.scale)):
        assert residuals.figures(1, wrong)["normal_p"] is not None


def measured(seed: int) -> NoiseFit:
    fit = NoiseFit()
    for call in range(len(STEPS)):
        fit.add(call, *outputs(call, seed)[1:])
    return fit


def outputs(call: int, seed: int) -> tuple[Images, Images, Images]:
    """x, float, quantized: an error with a slope, a bias and a Gaussian rest; none at call 2."""
    x, w = initial_noise(seed, SHAPE), initial_noise(100 + seed, SHAPE)
    error = np.float32(0.1) * initial_noise(200 + seed, SHAPE)
    return x, w, w if call == 2 else w * np.float32(1.05) + np.float32(0.02) + error


def states_behind(correction: Correction) -> StateFit:
    states = StateFit()
    for call, step in enumerate(STEPS):
        x, w, q = outputs(call, 1)
        found = [step.advance({"x": x}, o, np.empty_like(x))["x"] for o in (w, correction.apply(q, call))]
        states.add(call, *found)
    return states


def made(gate: bool = True) -> tuple[dict[str, Any], Correction]:
    fit, held_out = measured(0), measured(1)
    correction = fit.correction(DEPLOYMENT, STEPS, "epsilon", "regression")
    residuals = Residuals(0)
    for call in range(len(STEPS)):
        add(residuals, call, *outputs(call, 1)[1:])
    gated, rows = fit.gated(correction, STEPS, held_out, states_behind(correction))
    return noise_report(gated if gate else correction, STEPS, rows, residuals, gate=gate), correction


def test_a_row_for_each_call() -> None:
    report, correction = made()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report == made()[0]
    assert (report["form"], report["gate"], len(report["calls"])) == ("regression", True, 4)
    noise = correction.noise(STEPS)
    for call, (row, step) in enumerate(zip(report["calls"], STEPS, strict=True)):
        assert (row["timestep"], row["stage"], row["sigma"]) == (step.timestep, step.stage, step.sigma)
        if call == 2:
            assert row["sqnr_db"]["none"] is None
            assert row["normal_p"] is None
            continue
        assert row["kept"] == "both"
        assert row["slope"] == pytest.approx(1 / correction.scale[call] - 1)
        assert row["bias"] == pytest.approx(np.sqrt(np.mean(correction.shift[call] ** 2)))
        assert row["spread"] == pytest.approx(correction.spread[call], rel=1e-9)
        assert row["normal_p"] > 1e-3
        assert row["sqnr_db"]["both"] > row["sqnr_db"]["none"] + 0.5
        if row["variance_kept"]:
            assert row["noise"] == noise[call]
        else:
            assert row["noise"] == step.sigma


def test_the_summary_is_one_line_of_the_figures() -> None:
    report, _ = made()
    slope = max(abs(row["slope"]) for row in report["calls"])
    none, kept = report["shares"]["none"], report["shares"]["kept"]
    assert kept > none
    assert report["summary"].startswith(f"regression: slope up to {slope:.4f}, spread up to ")
    assert f"held out {none:.2f} -> {kept:.2f} dB a call" in report["summary"]
    assert "\n" not in report["summary"]
    assert "the noise of" in report["summary"]


def test_without_the_gate_everything_is_said_to_be_kept() -> None:
    report, correction = made(gate=False)
    assert {row["kept"] for row in report["calls"]} == {"both"}
    assert [row["variance_kept"] for row in report["calls"]] == [step.sigma > 0 for step in STEPS]
    assert [row["noise"] for row in report["calls"]] == list(correction.noise(STEPS))
    assert "switched off" not in report["summary"]
