"""Noise that was planted is measured: each form against numpy's own definitions on whole arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.runtime.arrays import Doubles, Floats
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.correction import FORMS, Correction
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.noise_fit import NoiseFit, StateFit
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.sampling.steps import Step

SCHEDULE = Schedule.named("ddpm-linear")
DEPLOYMENT = Deployment.of(SCHEDULE, "ddim", 2, 1.0)
STEPS = DEPLOYMENT.solver(SCHEDULE).steps
SLOPES = (0.07, -0.08)
BIAS = np.array([0.02, -0.05, 0.01])
MEANS = np.array([0.3, -0.2, 0.0])
SPREAD = 0.1
TABLES = ("scale", "shift", "excess", "spread")


def pair(call: int, seed: int = 0, batch: int = 64, means: Doubles = MEANS) -> tuple[Floats, Floats]:
    """Float and quantized outputs: the error has a slope, a bias per channel, and a Gaussian rest."""
    rng = np.random.default_rng([seed, call])
    wanted = rng.normal(size=(batch, 3, 16, 16))
    wanted += means[:, None, None] - wanted.mean(axis=(0, 2, 3))[:, None, None]
    rest = rng.normal(scale=SPREAD, size=wanted.shape)
    got = wanted * (1 + SLOPES[call]) + BIAS[:, None, None] + rest
    return wanted.astype(np.float32), got.astype(np.float32)


def measured(seed: int = 0, means: Doubles = MEANS) -> NoiseFit:
    fit = NoiseFit()
    for call in range(len(STEPS)):
        fit.add(call, *pair(call, seed, means=means))
    return fit


def fitted(form: str, means: Doubles = MEANS) -> Correction:
    return measured(means=means).correction(DEPLOYMENT, STEPS, "epsilon", form)


def within(a: Doubles, b: Doubles) -> float:
    """Covariance within the channels, averaged over these."""
    parts = [np.cov(a[:, c].ravel(), b[:, c].ravel(), bias=True)[0, 1] for c in range(a.shape[1])]
    return float(np.mean(parts))


def by_definition(form: str, call: int) -> dict[str, Doubles | float]:
    """The formulas once more, with whole arrays and numpy's own least squares and covariances."""
    w, q = (array.astype(np.float64) for array in pair(call))
    d = q - w
    over = (0, 2, 3)
    if form == "regression":
        scale = within(w, q) / within(q, q)
        shift = (scale * q - w).mean(axis=over)
    else:
        k = float(np.polyfit(w.ravel(), d.ravel(), 1)[0])
        k = max(k, 0.0) if form == "ptqd-released" else k
        scale = 1 / (1 + k)
        shift = (d if form == "ptqd-released" else d - k * w).mean(axis=over) / (1 + k)
    fixed = scale * q - shift[:, None, None]
    left = fixed - w
    spread = float(np.sqrt(within(left, left)))
    return {"scale": scale, "shift": shift, "excess": spread**2, "spread": spread}


def check_definition(found: Correction, form: str, call: int) -> None:
    for name, value in by_definition(form, call).items():
        np.testing.assert_allclose(getattr(found, name)[call], value, rtol=1e-5, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_a_fit_is_its_definition(form: str, call: int) -> None:
    found = fitted(form)
    check_definition(found, form, call)
    for name in TABLES:
        with pytest.raises(AssertionError, match=name):
            check_definition(replace(found, **{name: getattr(found, name) * 1.01}), form, call)


def test_the_forms_are_different_ones() -> None:
    regression, paper, released = (fitted(form) for form in FORMS)
    assert abs(regression.scale[0] - paper.scale[0]) > 1e-3
    assert paper.scale[0] == pytest.approx(released.scale[0], rel=1e-12)
    assert released.scale[1] == 1.0 < paper.scale[1]  # a falling slope is not undone by the released code
    # The bias differs between channels as the means do, which leaks a little into the pooled slope.
    assert paper.scale[0] == pytest.approx(1 / (1 + SLOPES[0]), rel=0.02)


def mean_square(call: int, scale: float, shift: Doubles) -> float:
    w, q = (array.astype(np.float64) for array in pair(call))
    return float(np.square(scale * q - shift[:, None, None] - w).mean())


@pytest.mark.parametrize("call", [0, 1])
def test_a_regression_leaves_the_least_mean_square(call: int) -> None:
    found = fitted("regression")
    scale, shift = float(found.scale[call]), found.shift[call]
    least = mean_square(call, scale, shift)
    assert least == pytest.approx(found.spread[call] ** 2, rel=1e-5)  # nothing is left of any channel's mean
    for other in (0.99, 1.01):
        assert mean_square(call, scale * other, shift) > least
        for channel in range(3):
            moved = shift.copy()
            moved[channel] += (other - 1) * 0.3
            assert mean_square(call, scale, moved) > least
    for form in ("ptqd", "ptqd-released"):
        worse = fitted(form)
        assert mean_square(call, float(worse.scale[call]), worse.shift[call]) > least


def test_the_released_form_is_the_papers_where_channels_have_no_mean() -> None:
    """Elsewhere their shifts are k * E[w_c] / (1 + k) apart."""

    def check(means: Doubles, apart: Doubles) -> None:
        paper, released = (fitted(form, means) for form in ("ptqd", "ptqd-released"))
        np.testing.assert_allclose(released.shift[0] - paper.shift[0], apart, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(released.scale[0], paper.scale[0], rtol=1e-12)

    check(np.zeros(3), np.zeros(3))
    scale = float(fitted("ptqd").scale[0])
    slope = 1 / scale - 1
    means = pair(0)[0].astype(np.float64).mean(axis=(0, 2, 3))
    check(MEANS, slope * means / (1 + slope))
    with pytest.raises(AssertionError):
        check(MEANS, np.zeros(3))
    with pytest.raises(AssertionError):
        check(MEANS, slope * means)


@settings(deadline=None, max_examples=25)
@given(parts=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 4), st.booleans()), max_size=6))
def test_merging_two_fits_is_fitting_all_their_data(parts: list[tuple[int, int, bool]]) -> None:
    left, right, union = NoiseFit(), NoiseFit(), NoiseFit()
    data: dict[int, list[tuple[Floats, ...]]] = {}
    for seed, (call, batch, to_left) in enumerate([(0, 2, True), (1, 2, False), *parts]):
        arrays = pair(call, seed, batch)
        (left if to_left else right).add(call, *arrays)
        data.setdefault(call, []).append(arrays)
    for call, pieces in data.items():
        union.add(call, *(np.concatenate([piece[i] for piece in pieces]) for i in range(2)))
    assert (left + right).calls == (0, 1)
    for form in FORMS:
        merged, whole = (fit.correction(DEPLOYMENT, STEPS, "epsilon", form) for fit in (left + right, union))
        for name in TABLES:
            np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-6, atol=1e-10)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(merged.scale * 1.01, whole.scale, rtol=1e-6)
    assert left.calls[0] == 0 and (parts or left.calls == (0,))


@pytest.mark.parametrize("form", FORMS)
def test_constant_and_exact_outputs_need_no_slope(form: str) -> None:
    wanted = np.full((2, 3, 4, 4), 0.5, dtype=np.float32)
    w = pair(1)[0]
    fit = NoiseFit()
    fit.add(0, wanted, wanted + np.float32(0.25))
    fit.add(1, w, w)
    found = fit.correction(DEPLOYMENT, STEPS, "epsilon", form)
    np.testing.assert_allclose(found.scale, 1.0, rtol=1e-12)
    np.testing.assert_allclose(found.shift, [[0.25] * 3, [0.0] * 3], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.spread, 0.0, atol=1e-7)
    np.testing.assert_allclose(found.excess, 0.0, atol=1e-12)


# What the error does to the next state.


def outputs(call: int, seed: int = 0, follows: float = 0.0) -> tuple[Floats, Floats, Floats]:
    """x, a float output that belongs to it, and a corrected one whose rest follows x by so much."""
    rng = np.random.default_rng([seed, call, 7])
    x = rng.normal(size=(64, 3, 16, 16))
    wanted = 0.8 * x + 0.6 * rng.normal(size=x.shape)
    fixed = wanted + follows * x + rng.normal(scale=SPREAD, size=x.shape)
    return x.astype(np.float32), wanted.astype(np.float32), fixed.astype(np.float32)


def states_of(call: int, steps: tuple[Step, ...], **options: Any) -> tuple[Floats, Floats]:
    """x' without noise behind the float output and behind the corrected one."""
    x, wanted, fixed = outputs(call, **options)
    spare = np.empty_like(x)
    return tuple(steps[call].advance({"x": x}, out, spare)["x"] for out in (wanted, fixed))  # type: ignore[return-value]


def state_fit(steps: tuple[Step, ...], **options: Any) -> StateFit:
    fit = StateFit()
    for call in range(len(steps)):
        f, g = states_of(call, steps, **options)
        for piece in range(4):
            fit.add(call, f[16 * piece : 16 * piece + 16], g[16 * piece : 16 * piece + 16])
    return fit


UNCLIPPED = Schedule.from_config({"beta_schedule": "linear", "clip_sample": False})
TWENTY = Deployment.of(UNCLIPPED, "ddim", 20, 1.0)


@pytest.mark.parametrize("follows", [0.0, 0.3, -0.3])
def test_variances_of_the_state_are_their_definition(follows: float) -> None:
    steps = TWENTY.solver(UNCLIPPED).steps
    fit = state_fit(steps, follows=follows)

    def check(moved: float, added: float, call: int) -> None:
        f, g = (a.astype(np.float64) for a in states_of(call, steps, follows=follows))
        assert moved == pytest.approx((g - f).var(), rel=1e-6)
        assert added == pytest.approx(g.var() - f.var(), rel=1e-6, abs=1e-9)

    for call in (0, 9, 19):
        check(fit.moved(call), fit.added(call), call)
        for wrong in ((1.01, 1.0), (1.0, 1.01)):
            with pytest.raises(AssertionError):
                check(fit.moved(call) * wrong[0], fit.added(call) * wrong[1], call)


def test_where_nothing_is_clipped_an_independent_error_moves_the_state_by_its_gain() -> None:
    """What PTQD assumes; where pictures are clipped, most of it goes."""
    steps = TWENTY.solver(UNCLIPPED).steps
    fit = state_fit(steps)
    clipped = Schedule.from_config({"beta_schedule": "linear", "clip_sample": True})
    short = state_fit(TWENTY.solver(clipped).steps)
    for call in (0, 5, 12):
        wanted = steps[call].gain ** 2 * SPREAD**2
        assert fit.moved(call) == pytest.approx(wanted, rel=0.02)
        assert fit.moved(call) != pytest.approx(wanted * 1.05, rel=0.02)
        assert fit.added(call) == pytest.approx(wanted, rel=0.4)
    assert short.moved(0) < 0.5 * fit.moved(0)


def corrected(steps: tuple[Step, ...], deployment: Deployment, form: str = "regression") -> tuple[NoiseFit, Correction]:
    fit = NoiseFit()
    for call in range(len(steps)):
        fit.add(call, *outputs(call)[1:])
    return fit, fit.correction(deployment, steps, "epsilon", form)


def test_measured_tables_take_what_the_states_moved() -> None:
    steps = TWENTY.solver(UNCLIPPED).steps
    _, correction = corrected(steps, TWENTY)
    states = state_fit(steps, follows=0.2)
    found = states.measured(correction, steps)
    for name in ("scale", "shift", "spread"):
        np.testing.assert_array_equal(getattr(found, name), getattr(correction, name))
    for call, (step, noise) in enumerate(zip(steps, found.noise(steps), strict=True)):
        assert found.excess[call] * step.gain**2 == pytest.approx(states.moved(call), rel=1e-9)
        if step.sigma > 0 and not found.clamped(steps)[call]:
            assert noise**2 == pytest.approx(step.sigma**2 - states.moved(call), rel=1e-6)
    still = [replace(step, next={"x": 1.0}) for step in steps]
    assert not states.measured(correction, still).excess.any()


@pytest.mark.parametrize("form", FORMS)
def test_the_variance_of_the_next_state_is_the_float_ones(form: str) -> None:
    """With the lessened noise drawn; a twin with the schedule's own noise is noticed."""
    steps = TWENTY.solver(UNCLIPPED).steps
    _, correction = corrected(steps, TWENTY, form)
    states = state_fit(steps)
    found = states.measured(correction, steps) if form == "regression" else correction
    noise, checked = found.noise(steps), 0
    for call in (8, 10, 12, 14):
        f, g = (a.astype(np.float64) for a in states_of(call, steps))
        error, sigma = (g - f).var(), steps[call].sigma
        if found.clamped(steps)[call]:
            continue
        checked += 1
        # The error is independent of the float state: what both add up to is the schedule's sigma again.
        assert error + noise[call] ** 2 == pytest.approx(sigma**2, rel=2e-3)
        assert error + sigma**2 != pytest.approx(sigma**2, rel=2e-3)
        assert error + (noise[call] * 1.01) ** 2 != pytest.approx(sigma**2, rel=2e-3)
    assert checked >= 2


# The gate.


def quiet_states(calls: int = 2) -> StateFit:
    """States that no error moved."""
    fit, state = StateFit(), pair(0)[0]
    for call in range(calls):
        fit.add(call, state, state)
    return fit


def test_what_helps_stays_and_what_does_not_is_switched_off() -> None:
    """Call 0 is judged on more of the same; call 1 on data without any error."""
    fit = measured()
    found = fit.correction(DEPLOYMENT, STEPS, "epsilon", "regression")
    held_out = NoiseFit()
    held_out.add(0, *pair(0, seed=1))
    w = pair(1, seed=1)[0]
    held_out.add(1, w, w)
    gated, rows = fit.gated(found, STEPS, held_out, quiet_states())
    assert [row["kept"] for row in rows] == ["both", "none"]
    assert gated.scale.tolist() == [found.scale[0], 1.0]
    np.testing.assert_array_equal(gated.shift, [found.shift[0], np.zeros(3)])
    assert rows[0]["sqnr_db"]["both"] > rows[0]["sqnr_db"]["bias"] > rows[0]["sqnr_db"]["none"]
    assert rows[1]["sqnr_db"]["none"] is None  # nothing is left of no error
    # The same tables, where both calls are as they were.
    same, rows = fit.gated(found, STEPS, measured(seed=1), quiet_states())
    assert [row["kept"] for row in rows] == ["both", "both"]
    np.testing.assert_array_equal(same.scale, found.scale)


def held_out_with(slope: float, bias: Doubles) -> NoiseFit:
    fit = NoiseFit()
    for call in range(2):
        w = pair(call, seed=2)[0]
        rest = np.random.default_rng(call).normal(scale=0.01, size=w.shape)
        fit.add(call, w, (w * (1 + slope) + bias[:, None, None] + rest).astype(np.float32))
    return fit


@pytest.mark.parametrize(
    ("slope", "bias", "kept"),
    [(0.2, np.zeros(3), "slope"), (-0.2, BIAS * 20, "bias"), (0.2, BIAS * 20, "both"), (-0.2, -BIAS, "none")],
)
def test_each_part_is_judged_by_itself(slope: float, bias: Doubles, kept: str) -> None:
    """Tables of slope 0.2 and twenty biases, on data where one of both, both, or neither is so."""
    fit = held_out_with(0.2, BIAS * 20)
    found = fit.correction(DEPLOYMENT, STEPS, "epsilon", "regression")
    gated, rows = fit.gated(found, STEPS, held_out_with(slope, bias), quiet_states())
    assert [row["kept"] for row in rows] == [kept] * 2
    slopes = abs(gated.scale - 1) > 0.1
    biases = abs(gated.shift).max(axis=1) > 0.1
    assert slopes.all() if kept in ("slope", "both") else not slopes.any()
    assert biases.all() if kept in ("bias", "both") else not biases.any()


def states_with(share: float) -> StateFit:
    """The error of x' is 0.01 large in variance and adds `share` of it to the variance of the state."""
    rng = np.random.default_rng(6)
    f = rng.normal(size=(64, 3, 16, 16))
    rest = rng.normal(size=f.shape)
    f, rest = ((a - a.mean()) / a.std() for a in (f, rest))
    rest -= (f * rest).mean() * f
    # Var(g) - Var(f) = moved + 2 Cov(f, g - f): the covariance that makes the share.
    along = 0.01 * (share - 1) / 2
    move = along * f + np.sqrt(0.01 - along**2) / rest.std() * rest
    fit = StateFit()
    for call in range(2):
        fit.add(call, f, f + move)
    return fit


@pytest.mark.parametrize(("share", "kept"), [(1.0, True), (0.7, True), (0.3, False), (-0.5, False)])
def test_the_noise_is_lessened_only_where_this_brings_the_variance_nearer(share: float, kept: bool) -> None:
    fit, states = measured(), states_with(share)
    found = states.measured(fit.correction(DEPLOYMENT, STEPS, "epsilon"), STEPS)
    gated, rows = fit.gated(found, STEPS, measured(seed=1), states)
    assert rows[0]["variance_kept"] is kept
    assert rows[0]["variance_taken"] == pytest.approx(0.01, rel=1e-6)
    assert rows[0]["variance_added"] == pytest.approx(0.01 * share, rel=1e-6)
    assert gated.excess[0] == (found.excess[0] if kept else 0.0)
    step = STEPS[0]
    assert gated.noise(STEPS)[0] == (found.noise(STEPS)[0] if kept else step.sigma)
    assert found.noise(STEPS)[0] < step.sigma


def test_a_step_without_noise_keeps_no_variance() -> None:
    quiet = Deployment.of(SCHEDULE, "ddim", 2, 0.0)
    steps = quiet.solver(SCHEDULE).steps
    fit = measured()
    found = fit.correction(quiet, steps, "epsilon")
    gated, rows = fit.gated(found, steps, measured(seed=1), states_with(1.0))
    assert not any(row["variance_kept"] for row in rows)
    assert not gated.excess.any()
    assert gated.noise(steps) == found.noise(steps) == (0.0, 0.0)


def test_refused_fits() -> None:
    fit = NoiseFit()
    w, q = pair(0)
    with pytest.raises(InputError, match="outputs of shapes"):
        fit.add(0, w, q[:1])
    with pytest.raises(InputError, match="outputs of shapes"):
        fit.add(0, w[:0], q[:0])
    fit.add(0, w, q)
    with pytest.raises(InputError, match="channels cannot be merged"):
        fit.add(0, w[:, :1], q[:, :1])
    with pytest.raises(InputError, match=r"call 1 \(1 of 2 are missing\)"):
        fit.correction(DEPLOYMENT, STEPS, "epsilon")
    with pytest.raises(InputError, match="no form of correction is called 'best'"):
        fit.correction(DEPLOYMENT, STEPS, "epsilon", "best")
    whole = measured()
    tables = whole.correction(DEPLOYMENT, STEPS, "epsilon")
    with pytest.raises(InputError, match="no error was measured at network call 1"):
        whole.gated(tables, STEPS, fit, quiet_states())
    with pytest.raises(InputError, match="no state was measured behind network call 1"):
        whole.gated(tables, STEPS, whole, quiet_states(1))
    fit.add(1, w[:, :1], q[:, :1])
    with pytest.raises(InputError, match="different numbers of channels"):
        fit.correction(DEPLOYMENT, STEPS, "epsilon")
    lost = NoiseFit()
    for call in range(2):
        lost.add(call, w, -w)
    for form in ("ptqd", "regression"):
        with pytest.raises(InputError, match="does not follow"):
            lost.correction(DEPLOYMENT, STEPS, "epsilon", form)
    assert (lost.correction(DEPLOYMENT, STEPS, "epsilon", "ptqd-released").scale == 1.0).all()


@pytest.mark.parametrize(("axis", "move"), [(1, (64, 3, 8)), (1, (64, 3, 2, 2, 2)), (2, (64, 8, 3))])
def test_channels_may_be_along_another_axis(tmp_path: Path, axis: int, move: tuple[int, ...]) -> None:
    """Audio, video and tokens with the values of images have their tables, and the same corrections."""

    def reshaped(images: Floats) -> Floats:
        flat = images[:, :, :2, :4].reshape(64, 3, 8)
        return np.ascontiguousarray(flat.transpose(0, 2, 1) if axis == 2 else flat.reshape(move))

    pairs = [pair(call, batch=64) for call in (0, 1)]
    images, others = NoiseFit(), NoiseFit(axis)
    for call, (w, q) in enumerate(pairs):
        images.add(call, w[:, :, :2, :4], q[:, :, :2, :4])
        others.add(call, reshaped(w), reshaped(q))
    want, found = (fit.correction(DEPLOYMENT, STEPS, "epsilon") for fit in (images, others))
    for name in TABLES:
        np.testing.assert_allclose(getattr(found, name), getattr(want, name), rtol=1e-9)
    found.save(tmp_path / "c")
    loaded = Correction.load(tmp_path / "c")
    assert loaded.channel_axis == axis
    q = pairs[1][1]
    np.testing.assert_allclose(
        loaded.apply(reshaped(q), 1), reshaped(want.apply(np.ascontiguousarray(q), 1)), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(InputError, match="the correction has 3 channels"):
        loaded.apply(np.zeros((2, 5, 7), np.float32), 0)
    if axis != 1:
        with pytest.raises(InputError, match="different axes"):
            images + others
