"""Tables of a correction: what they do to an output and to the noise, on disk, and for another number of steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from mezzotint.runtime.errors import BundleError, InputError, InterpolatedCorrection, TimestepNotDeployed
from mezzotint.runtime.sampling.correction import FORMS, Correction
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.samplers import Stepper, initial_noise
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.sampling.steps import Step

SCHEDULE = Schedule.named("ddpm-linear")
TABLES = ("scale", "shift", "excess", "spread")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True}


def steps_of(deployment: Deployment, schedule: Schedule = SCHEDULE) -> tuple[Step, ...]:
    return deployment.solver(schedule).steps


def planted(
    deployment: Deployment, schedule: Schedule = SCHEDULE, *, form: str = "ptqd", spread: float = 0.05, **changes: Any
) -> Correction:
    """Tables that differ from call to call; the variance is that of an independent error of this spread."""
    steps = steps_of(deployment, schedule)
    n = len(steps)
    tables: dict[str, npt.NDArray[Any]] = {
        "stages": np.array([step.stage for step in steps], np.int64),
        "scale": 1 / (1.02 + np.arange(n) / 100),
        "shift": np.linspace(-0.1, 0.1, 3 * n).reshape(n, 3),
        "excess": np.full(n, spread**2),
        "spread": np.full(n, spread),
    }
    return Correction(deployment, schedule.prediction, form, **{**tables, **changes})


ETA_ONE = Deployment.of(SCHEDULE, "ddim", 10, 1.0)


def test_an_output_is_scaled_and_shifted_by_channel() -> None:
    correction = planted(ETA_ONE)
    output = initial_noise(3, (4, 3, 5, 5))
    before = output.copy()
    for call in (0, 7):
        found = correction.apply(output, call)
        wanted = output * correction.scale[call] - correction.shift[call][:, None, None]
        assert found.dtype == np.float32
        assert not np.shares_memory(found, output)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(correction.apply(output, call + 1), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output, before)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.0), ("ddim", 0.4), ("ddpm", 0.0), ("euler-ancestral", 0.0)])
def test_ptqd_lessens_the_noise_by_the_variance_of_the_error(sampler: str, eta: float) -> None:
    deployment = Deployment.of(SCHEDULE, sampler, 10, eta)
    correction, steps = planted(deployment, spread=0.02), steps_of(deployment)
    noisy = 0
    for step, noise, clamped in zip(steps, correction.noise(steps), correction.clamped(steps), strict=True):
        if step.sigma == 0 or clamped:
            assert noise == 0.0
            continue
        noisy += 1
        assert noise**2 == pytest.approx(step.sigma**2 - step.gain**2 * 0.02**2, rel=1e-9)
        assert noise**2 != pytest.approx(step.sigma**2 - step.gain**2 * 0.0202**2, rel=1e-9)
        assert 0 < noise < step.sigma
    assert noisy >= 6


def test_the_excess_is_taken_by_the_squared_gain() -> None:
    """Whatever the spread: an excess that was measured on states may be less."""
    excess = np.linspace(0, 0.002, 10)
    correction, steps = planted(ETA_ONE, excess=excess), steps_of(ETA_ONE)
    noises = correction.noise(steps)
    for step, noise, one in zip(steps[:-1], noises, excess, strict=False):
        assert noise**2 == pytest.approx(max(0.0, step.sigma**2 - step.gain**2 * one), rel=1e-9)
    assert noises[0] == steps[0].sigma
    assert any(
        0 < noise**2 != pytest.approx(step.sigma**2 - 1.01 * step.gain**2 * one, rel=1e-9)
        for step, noise, one in zip(steps[1:], noises[1:], excess[1:], strict=True)
    )


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp-2m", "pndm"])
@pytest.mark.parametrize("form", FORMS)
def test_a_sampler_without_noise_gets_none(sampler: str, form: str) -> None:
    schedule = Schedule.from_config(SD)
    deployment = Deployment.of(schedule, sampler, 8)
    for excess in (0.0, 1.0):
        correction = planted(deployment, schedule, form=form, excess=np.full(len(deployment.calls), excess))
        steps = steps_of(deployment, schedule)
        assert set(correction.noise(steps)) == {0.0}
        assert not any(correction.clamped(steps))
        assert Stepper(deployment.solver(schedule), correction).solver.steps == steps


def test_too_much_error_makes_a_step_deterministic() -> None:
    deployment = Deployment.of(SCHEDULE, "ddpm", 10)
    correction, steps = planted(deployment, spread=100.0), steps_of(deployment)
    assert correction.noise(steps) == (0.0,) * 10
    assert correction.clamped(steps) == (True,) * 9 + (False,)  # the last step has no noise of its own
    assert not any(planted(deployment, spread=0.0).clamped(steps))


def test_only_the_released_form_turns_the_direction_of_ddim() -> None:
    solver = ETA_ONE.solver(SCHEDULE)
    for form in ("regression", "ptqd"):
        assert planted(ETA_ONE, form=form).redirected(solver) is solver
    correction = planted(ETA_ONE, form="ptqd-released")
    changed = correction.redirected(solver)
    noises = correction.noise(solver.steps)
    bars = [*SCHEDULE.alphas_cumprod[[int(t) for t in ETA_ONE.calls[1:]]], 1.0]
    for step, other, noise, bar in zip(solver.steps, changed.steps, noises, bars, strict=True):
        # sqrt(1 - abar' - sigma^2) with the sigma that is left; the image's share is as it was.
        assert other.next["out"] == pytest.approx(np.sqrt(max(0.0, 1 - bar - noise**2)), rel=1e-6, abs=1e-7)
        assert (other.next["image"], other.sigma) == (step.next["image"], step.sigma)
        if 0 < noise < step.sigma:
            assert other.next["out"] > step.next["out"]
    assert sum(a.next["out"] != b.next["out"] for a, b in zip(solver.steps, changed.steps, strict=True)) >= 6
    stepper = Stepper(solver, correction)
    assert (stepper.solver, stepper.noise) == (changed, noises)
    ddpm = Deployment.of(SCHEDULE, "ddpm", 10)
    plain = ddpm.solver(SCHEDULE)
    assert planted(ddpm, form="ptqd-released").redirected(plain) is plain


def test_the_released_form_knows_epsilon_only() -> None:
    schedule = Schedule.from_config({"beta_schedule": "linear", "prediction_type": "v_prediction"})
    deployment = Deployment.of(schedule, "ddim", 5, 1.0)
    correction = planted(deployment, schedule, form="ptqd-released")
    with pytest.raises(InputError, match="is defined for epsilon, not v_prediction") as caught:
        Stepper(deployment.solver(schedule), correction)
    assert caught.value.hint == "use form ptqd"


def test_tables_of_other_calls_are_refused() -> None:
    other = steps_of(Deployment.of(SCHEDULE, "ddim", 5, 1.0))
    for ask in (planted(ETA_ONE).noise, planted(ETA_ONE).clamped):
        with pytest.raises(TimestepNotDeployed, match="rows for other network calls than these 5") as caught:
            ask(other)
        assert "ddim, 10 steps, eta 1" in str(caught.value)


# Another number of steps.


def interpolated(correction: Correction, deployment: Deployment, schedule: Schedule = SCHEDULE) -> Correction:
    with pytest.warns(InterpolatedCorrection, match=f"are interpolated for {deployment.steps}"):
        return correction.for_deployment(deployment, steps_of(deployment, schedule))


def check_interpolation(found: Correction, known: Correction, schedule: Schedule = SCHEDULE) -> None:
    """Between the nearest rows of the same stage, linear in the timestep; the end rows beyond the ends."""
    for i, (t, stage) in enumerate(zip(found.deployment.calls, found.stages, strict=True)):
        rows = sorted((c, k) for k, c in enumerate(known.deployment.calls) if known.stages[k] == stage)
        below = max((row for row in rows if row[0] <= t), default=rows[0])
        above = min((row for row in rows if row[0] >= t), default=rows[-1])
        share = 0.0 if above[0] == below[0] else (t - below[0]) / (above[0] - below[0])
        for name in TABLES:
            table = getattr(known, name)
            wanted = (1 - share) * table[below[1]] + share * table[above[1]]
            np.testing.assert_allclose(getattr(found, name)[i], wanted, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "pndm", "euler-ancestral", "lcm"])
@pytest.mark.parametrize("steps", [4, 20, 7])
def test_rows_between_the_fitted_ones(sampler: str, steps: int) -> None:
    schedule = Schedule.from_config(SD)
    deployment = Deployment.of(schedule, sampler, 10)
    known = planted(deployment, schedule, excess=np.linspace(0, 1e-3, len(deployment.calls)))
    other = Deployment.of(schedule, sampler, steps)
    found = interpolated(known, other, schedule)
    assert (found.deployment, found.form, found.prediction) == (other, known.form, known.prediction)
    assert found.stages.tolist() == [step.stage for step in steps_of(other, schedule)]
    check_interpolation(found, known, schedule)
    with pytest.raises(AssertionError):
        check_interpolation(replace(found, scale=found.scale * 1.001), known, schedule)
    assert len(found.noise(steps_of(other, schedule))) == len(other.calls)


def test_common_timesteps_keep_their_rows_to_the_last_bit() -> None:
    known = planted(ETA_ONE)
    twenty = Deployment.of(SCHEDULE, "ddim", 20, 1.0)
    found = interpolated(known, twenty)
    common = [(twenty.calls.index(t), k) for k, t in enumerate(ETA_ONE.calls)]
    assert len(common) == 10
    for name in TABLES:
        for i, k in common:
            np.testing.assert_array_equal(getattr(found, name)[i], getattr(known, name)[k])
    between = twenty.calls.index(50)
    assert known.scale[-1] < found.scale[between] < known.scale[-2]


def test_both_calls_of_a_step_are_interpolated_apart() -> None:
    """Heun's second call has the timestep of the next step's first, and another error."""
    schedule = Schedule.from_config({**SD, "timestep_spacing": "leading"})
    ten, five = (Deployment.of(schedule, "heun", n) for n in (10, 5))
    stages = np.array([step.stage for step in steps_of(ten, schedule)])
    known = planted(ten, schedule, scale=np.where(stages == 0, 0.9, 0.5))
    found = interpolated(known, five, schedule)
    assert found.scale.tolist() == [0.9 if stage == 0 else 0.5 for stage in found.stages]
    assert set(found.stages.tolist()) == {0, 1}
    one = Deployment.of(schedule, "heun", 1)
    with pytest.raises(InputError, match="knows no call of stage 1"):
        planted(one, schedule).for_deployment(ten, steps_of(ten, schedule))


def test_the_fitted_steps_need_no_interpolation() -> None:
    known = planted(ETA_ONE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert known.for_deployment(ETA_ONE, steps_of(ETA_ONE)) is known


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (lambda s: Deployment.of(s, "ddpm", 10), "fitted for ddim, 10 steps, eta 1, not for ddpm, 10 steps"),
        (lambda s: Deployment.of(s, "ddim", 10, 0.5), "not for ddim, 10 steps, eta 0.5"),
        (lambda s: Deployment.of(s, "ddim", 10, 1.0, 3.0), "at guidance 1, not 3: guidance multiplies the error"),
    ],
)
def test_another_way_of_sampling_is_refused(other: Callable[[Schedule], Deployment], why: str) -> None:
    deployment, known = other(SCHEDULE), planted(ETA_ONE)
    assert why in (known.refusal(deployment) or "")
    with pytest.raises(InputError, match=why):
        known.for_deployment(deployment, steps_of(deployment))
    assert known.refusal(ETA_ONE) is None
    assert known.refusal(Deployment.of(SCHEDULE, "ddim", 33, 1.0)) is None


# On disk.


def test_tables_survive_the_disk_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    guided = Deployment.of(SCHEDULE, "heun", 6, guidance=7.5)
    correction = planted(guided, form="ptqd")
    files = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for file in files:
        correction.save(file)
    assert len({file.read_bytes() for file in files}) == 1
    loaded = Correction.load(files[0])
    for name in (*TABLES, "stages"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(correction, name))
        assert getattr(loaded, name).dtype == getattr(correction, name).dtype
    assert (loaded.deployment, loaded.prediction, loaded.form) == (guided, "epsilon", "ptqd")
    assert loaded.fitted_for == "heun, 6 steps, guidance 7.5"
    assert steps_of(loaded.deployment) == steps_of(guided)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    missing, junk, other, short, wrong = (tmp_path / name for name in ("missing", "junk", "other", "short", "wrong"))
    junk.write_bytes(b"junk")
    save_file({"scale": np.zeros(2)}, other)
    planted(ETA_ONE).save(short)
    tables = load_file(short)
    with_metadata = short.read_bytes()
    save_file({**tables, "scale": tables["scale"][:3]}, wrong, {"mezzotint": '{"deployment": {}}'})
    short.write_bytes(with_metadata[:-8])
    for file in (missing, junk, other, short, wrong):
        with pytest.raises(BundleError, match="not a table of corrections") as caught:
            Correction.load(file)
        assert caught.value.where == str(file)


def test_refused_tables_and_calls() -> None:
    good = planted(ETA_ONE)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"scale": np.ones(3)}, "correction tables of 10 calls, form 'ptqd': scale do not fit"),
        ({"shift": np.zeros(10)}, "shift do not fit"),
        ({"stages": np.zeros((10, 1), np.int64)}, "stages do not fit"),
        ({"form": "best"}, "form 'best'"),
        ({"shift": np.full((10, 3), np.nan)}, "not finite"),
        ({"excess": np.full(10, np.inf)}, "not finite"),
        ({"excess": np.full(10, -0.1)}, "negative variance"),
        ({"spread": np.full(10, -0.1)}, "negative variance"),
        ({"scale": np.array([1.0] * 4 + [-0.1] + [1.0] * 5)}, "does not follow the float one at timestep 500"),
    ]
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            replace(good, **change)
    with pytest.raises(InputError, match="has 3 channels"):
        good.apply(initial_noise(0, (1, 2, 4, 4)), 0)
    with pytest.raises(InputError, match="has 3 channels"):
        good.apply(initial_noise(0, (3, 4, 4)), 0)
