"""Noise that was planted is measured, survives the disk, and is undone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mezzotint.runtime.correction import Correction, NoiseFit
from mezzotint.runtime.deployment import Deployment
from mezzotint.runtime.errors import BundleError, InputError, TimestepNotDeployed

Floats = npt.NDArray[np.float32]
DEPLOYMENT = Deployment("ddim", 2, 0.5, (600, 100))
SLOPES = {600: 0.07, 100: -0.03}
BIAS = np.array([0.02, -0.05, 0.01])
SPREAD = 0.1


def pair(t: int, seed: int = 0, batch: int = 64) -> tuple[Floats, Floats]:
    """Float and quantized outputs with a planted slope, a bias per channel and a Gaussian rest; means are not 0."""
    rng = np.random.default_rng([seed, t])
    wanted = rng.normal(size=(batch, 3, 16, 16)) + np.array([0.3, -0.2, 0.0])[:, None, None]
    rest = rng.normal(scale=SPREAD, size=wanted.shape)
    got = wanted * (1 + SLOPES[t]) + BIAS[:, None, None] + rest
    return wanted.astype(np.float32), got.astype(np.float32)


def fitted() -> Correction:
    fit = NoiseFit()
    for t in SLOPES:
        fit.add(t, *pair(t))
    return fit.correction(DEPLOYMENT)


def check_against_numpy(correction: Correction, t: int) -> None:
    """The definitions, written down once more with whole arrays and numpy's own least squares."""
    wanted, got = (array.astype(np.float64) for array in pair(t))
    error = got - wanted
    slope = np.polyfit(wanted.ravel(), error.ravel(), 1)[0]
    rest = error - slope * wanted
    mean = rest.mean(axis=(0, 2, 3))
    row = correction.rows[t]
    np.testing.assert_allclose(correction.slope[row], slope, rtol=1e-6)
    np.testing.assert_allclose(correction.bias[row], mean / (1 + slope), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(correction.spread[row], (rest - mean[:, None, None]).std() / (1 + slope), rtol=1e-6)


@pytest.mark.parametrize("t", SLOPES)
def test_fit_is_its_definition(t: int) -> None:
    correction = fitted()
    check_against_numpy(correction, t)
    for name in ("slope", "bias", "spread"):
        with pytest.raises(AssertionError):
            check_against_numpy(replace(correction, **{name: getattr(correction, name) * 1.01}), t)


def test_fit_finds_what_was_planted() -> None:
    correction = fitted()
    assert correction.timesteps.tolist() == [600, 100]
    # The bias differs between channels as the means do, which leaks a little into the pooled slope.
    assert correction.slope == pytest.approx([0.07, -0.03], abs=0.015)
    assert correction.spread_at(100) == pytest.approx(SPREAD / 0.97, rel=0.02)
    assert correction.fitted_for == "ddim, 2 steps, eta 0.5"
    assert correction.valid_for("ddim", 2, 0.5)
    assert not any(correction.valid_for(*other) for other in (("ddpm", 2, 0.5), ("ddim", 3, 0.5), ("ddim", 2, 0.0)))


@pytest.mark.parametrize("t", SLOPES)
def test_apply_leaves_only_the_spread(t: int) -> None:
    correction = fitted()
    wanted, got = pair(t)
    before = got.copy()
    left = correction.apply(got, t) - wanted
    np.testing.assert_array_equal(got, before)
    assert left.dtype == np.float32
    assert np.abs(left.mean(axis=(0, 2, 3))).max() < 1e-6
    assert left.std() == pytest.approx(correction.spread_at(t), rel=1e-4)
    assert left.std() != pytest.approx(correction.spread_at(t) * 1.01, rel=1e-4)
    assert np.square(left).mean() < 0.95 * np.square(got - wanted).mean()


def test_stages_fall() -> None:
    fit = NoiseFit()
    fit.add(600, *pair(600))
    wanted, got = (array.astype(np.float64) for array in pair(600))
    stages = fit.stages(600)
    assert stages["wanted"] == pytest.approx(np.square(wanted).mean(), rel=1e-9)
    assert stages["error"] == pytest.approx(np.square(got - wanted).mean(), rel=1e-9)
    assert stages["error"] > stages["without_slope"] > stages["without_slope_and_bias"]
    assert stages["without_slope_and_bias"] == pytest.approx(SPREAD**2, rel=0.05)


@settings(deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from([600, 100]), st.integers(1, 4), st.booleans()), max_size=8))
def test_merging_two_fits_is_fitting_all_their_data(parts: list[tuple[int, int, bool]]) -> None:
    left, right = NoiseFit(), NoiseFit()
    data: dict[int, list[tuple[Floats, Floats]]] = {}
    for seed, (t, batch, to_left) in enumerate([(600, 2, True), (100, 2, False), *parts]):
        outputs = pair(t, seed, batch)
        (left if to_left else right).add(t, *outputs)
        data.setdefault(t, []).append(outputs)
    union = NoiseFit()
    for t, outputs_of_t in data.items():
        union.add(t, *(np.concatenate([outputs[i] for outputs in outputs_of_t]) for i in (0, 1)))
    merged, whole = (left + right).correction(DEPLOYMENT), union.correction(DEPLOYMENT)
    for name in ("slope", "bias", "spread"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-8, atol=1e-11)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(getattr(merged, name) * 1.01, getattr(whole, name), rtol=1e-8, atol=1e-11)
    assert (left + right).timesteps == (100, 600)


def test_constant_and_exact_outputs_need_no_correction() -> None:
    wanted = np.full((2, 3, 4, 4), 0.5, dtype=np.float32)
    fit = NoiseFit()
    fit.add(600, wanted, wanted + np.float32(0.25))
    fit.add(100, *[pair(100)[0]] * 2)
    correction = fit.correction(DEPLOYMENT)
    assert correction.slope.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(correction.bias, [[0.25] * 3, [0.0] * 3], rtol=0, atol=1e-12)
    assert correction.spread.tolist() == [0.0, 0.0]


def test_tables_survive_the_disk_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    correction = fitted()
    files = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for file in files:
        correction.save(file)
    assert len({file.read_bytes() for file in files}) == 1
    loaded = Correction.load(files[0])
    for name in ("timesteps", "slope", "bias", "spread"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(correction, name))
    assert loaded.fitted_for == correction.fitted_for


def test_files_that_are_something_else(tmp_path: Path) -> None:
    missing, junk, other = (tmp_path / name for name in ("missing", "junk", "other"))
    junk.write_bytes(b"junk")
    save_file({"slope": np.zeros(2)}, other)
    for file in (missing, junk, other):
        with pytest.raises(BundleError, match="not a table of corrections") as caught:
            Correction.load(file)
        assert caught.value.where == str(file)


def test_refused_fits() -> None:
    fit = NoiseFit()
    wanted, got = pair(600)
    with pytest.raises(InputError, match="outputs of shapes"):
        fit.add(600, wanted, got[:1])
    with pytest.raises(InputError, match="outputs of shapes"):
        fit.add(600, wanted[:0], got[:0])
    fit.add(600, wanted, got)
    with pytest.raises(InputError, match="channels cannot be merged"):
        fit.add(600, wanted[:, :1], got[:, :1])
    with pytest.raises(InputError, match=r"timesteps \[100\]"):
        fit.correction(DEPLOYMENT)
    with pytest.raises(InputError, match="at timestep 100"):
        fit.stages(100)
    fit.add(100, wanted[:, :1], got[:, :1])
    with pytest.raises(InputError, match="different numbers of channels"):
        fit.correction(DEPLOYMENT)
    lost = NoiseFit()
    for t in SLOPES:
        lost.add(t, wanted, -wanted)
    with pytest.raises(InputError, match="does not follow"):
        lost.correction(DEPLOYMENT)


def test_refused_tables_and_calls() -> None:
    correction = fitted()
    with pytest.raises(InputError, match="different lengths"):
        replace(correction, slope=np.zeros(3))
    with pytest.raises(InputError, match="not finite"):
        replace(correction, bias=np.full((2, 3), np.nan))
    with pytest.raises(InputError, match="negative spread"):
        replace(correction, spread=np.array([0.1, -0.1]))
    with pytest.raises(InputError, match="two rows"):
        replace(correction, timesteps=np.array([5, 5]))
    with pytest.raises(TimestepNotDeployed, match="no row for timestep 5"):
        correction.apply(pair(600)[1], 5)
    with pytest.raises(TimestepNotDeployed, match="no row for timestep 5"):
        correction.spread_at(5)
    with pytest.raises(InputError, match="has 3 channels"):
        correction.apply(pair(600)[1][:, :2], 600)
