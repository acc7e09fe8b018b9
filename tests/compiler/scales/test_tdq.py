"""TDQ's networks: gradients against finite differences, and ranges that follow a drift, between the timesteps too."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.compiler.core.formats import UINT8, Format
from mezzotint.compiler.core.stats import Summary
from mezzotint.compiler.scales.ranges import expected_error
from mezzotint.compiler.scales.tdq import BINS, Networks, Observed, embed, learned_ranges, loss_and_gradient
from mezzotint.runtime.arrays import Doubles

SPAN = 1000
SMALL = Format(6)
TIMESTEPS = tuple(range(960, -1, -40))  # as a sampler calls them
BETWEEN = tuple(t - 20 for t in TIMESTEPS[:-1])


def summary_of(values: npt.NDArray[np.floating]) -> Summary:
    made = Summary()
    made.add(values.astype(np.float32))
    return made


def drifting(t: float, seed: int = 0) -> Summary:
    """What a SiLU makes of values whose size falls to a tenth from the first call to the last; no far outliers."""
    x = np.clip(np.random.default_rng([seed, int(t)]).standard_normal(20000), -3, 3) * np.exp(t / 400)
    return summary_of(x / (1 + np.exp(-x)))


def extremes(calls: list[Summary]) -> Doubles:
    return np.array([[[min(s.low, 0.0), max(s.high, 0.0)] for s in calls]])


def observed(seed: int = 0, fmt: Format = SMALL) -> Observed:
    """Two values and three calls in double precision, for derivatives."""
    calls = [[drifting(t, seed + v) for t in TIMESTEPS[:3]] for v in range(2)]
    return Observed.of(calls, np.concatenate([extremes(c) for c in calls]), fmt, np.float64)


def check_ranges_gradient(share: float, clip_weight: float, factor: float = 1.0) -> None:
    """The derivative along a random direction against a difference quotient, at a share of the measured reach."""
    seen, rng = observed(), np.random.default_rng(1)
    reach = seen.unit * share * rng.uniform(0.8, 1.2, (2, 3, 2))
    direction, small = rng.standard_normal(reach.shape), 1e-6
    up, down = (loss_and_gradient(seen, reach + e * direction, clip_weight)[0] for e in (small, -small))
    analytic = np.sum(loss_and_gradient(seen, reach, clip_weight)[1] * direction, axis=(1, 2)) * factor
    np.testing.assert_allclose(analytic, (up - down) / (2 * small), rtol=1e-4)


@pytest.mark.parametrize("clip_weight", [1.0, 10.0])
@pytest.mark.parametrize("share", [1.5, 0.7, 0.3])
def test_the_gradient_by_the_ranges_is_the_derivative(share: float, clip_weight: float) -> None:
    check_ranges_gradient(share, clip_weight)
    with pytest.raises(AssertionError):
        check_ranges_gradient(share, clip_weight, factor=1.01)


def check_network_gradient(parameter: int, factor: float = 1.0) -> None:
    """The derivative by one weight or bias, along a random direction, against a difference quotient."""
    seen, rng = observed(), np.random.default_rng(2)
    embedding = embed(TIMESTEPS[:3], SPAN, len(TIMESTEPS), np.float64)
    networks = Networks([(0, 0), (0, 1)], np.float64)
    for p in networks.parameters:
        p += 0.1 * rng.standard_normal(p.shape)  # the last layer starts at 0, where the others have no gradient
    direction = rng.standard_normal(networks.parameters[parameter].shape)

    def loss(shift: float) -> Doubles:
        networks.parameters[parameter] += shift * direction
        found = loss_and_gradient(seen, networks.forward(embedding)[0] * seen.unit, 2.0)[0]
        networks.parameters[parameter] -= shift * direction
        return np.asarray(found, np.float64)

    output, read = networks.forward(embedding)
    _, by_range = loss_and_gradient(seen, output * seen.unit, 2.0)
    analytic = networks.backward(by_range * seen.unit, read)[parameter] * direction
    quotient = (loss(1e-6) - loss(-1e-6)) / 2e-6
    np.testing.assert_allclose(analytic.sum(axis=(1, 2)) * factor, quotient, rtol=1e-3)


@pytest.mark.parametrize("parameter", range(8))
def test_the_gradient_by_the_networks_is_the_derivative(parameter: int) -> None:
    check_network_gradient(parameter)
    with pytest.raises(AssertionError):
        check_network_gradient(parameter, factor=1.01)


def check_loss(share: float, clip_weight: float, factor: float = 1.0) -> None:
    """Against the formula over the values themselves, which are spread as evenly as the formula takes them to be."""
    x = np.linspace(-1.0, 3.0, 400001)
    seen = Observed.of([[summary_of(x)]], np.array([[[-1.0, 3.0]]]), UINT8, np.float64)
    low, high = -share, 3.0 * share
    clipped = np.maximum(low - x, 0) + np.maximum(x - high, 0)
    want = (((high - low) / 255) ** 2 / 12 + clip_weight * np.mean(clipped**2)) / np.mean(x**2)
    got, _ = loss_and_gradient(seen, seen.unit * share, clip_weight)
    assert got[0] * factor == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize(("share", "clip_weight"), [(1.1, 1.0), (1.0, 5.0), (0.9, 1.0), (0.6, 5.0)])
def test_the_loss_is_the_relative_error(share: float, clip_weight: float) -> None:
    check_loss(share, clip_weight)
    with pytest.raises(AssertionError):
        check_loss(share, clip_weight, factor=1.01)


def test_every_value_is_in_a_bin() -> None:
    summary = drifting(500)
    assert len(summary.bins()[2]) > 2 * BINS
    seen = Observed.of([[summary]], extremes([summary]), UINT8, np.float64)
    power = summary.square / summary.count / seen.size**2
    assert float(seen.mass.sum()) == pytest.approx(float(1 / power.item()))
    assert np.all(seen.outer > seen.inner)
    assert float(seen.outer[0, 0, 1, 0] * seen.size.item()) == pytest.approx(summary.high)


@pytest.fixture(scope="module")
def tracked() -> tuple[Doubles, Doubles]:
    """Ranges `[timesteps, 2]` learned from one batch of images: at its timesteps, and between them."""
    calls = [drifting(t) for t in TIMESTEPS]
    learn = partial(learned_ranges, [calls], extremes(calls), UINT8, TIMESTEPS, SPAN, clip_weight=4.0, seed=0)
    return learn()[0], learn(at=BETWEEN)[0]


def relative_error(calls: list[Summary], ranges: Doubles) -> float:
    both = zip(calls, ranges, strict=True)
    errors = [expected_error(s, float(r[0]), float(r[1]), UINT8) * s.count / s.square for s, r in both]
    return float(np.mean(errors))


def check_follows(ranges: Doubles, calls: list[Summary], measured: Doubles) -> None:
    """Ranges that contain 0, go where the extremes of the calls go, and cost no more than the measured ones."""
    assert np.all(ranges[:, 0] <= 0)
    assert np.all(ranges[:, 1] >= 0)
    np.testing.assert_allclose(ranges[:, 1], measured[:, 1], rtol=0.25)
    assert relative_error(calls, ranges) <= 1.05 * relative_error(calls, measured)


@pytest.mark.parametrize("seed", [0, 1])  # the batch that it learned from, and another one
@pytest.mark.parametrize("between", [False, True])
def test_learned_ranges_follow_the_drift(tracked: tuple[Doubles, Doubles], between: bool, seed: int) -> None:
    """Against what was measured on the first batch: at the same timestep, or at the nearest one that was called."""
    calls = [drifting(t, seed) for t in (BETWEEN if between else TIMESTEPS)]
    measured = extremes([drifting(t) for t in TIMESTEPS])[0][: len(calls)]
    check_follows(tracked[int(between)], calls, measured)
    static = np.broadcast_to(measured.mean(axis=0), measured.shape)
    for wrong in (static, tracked[int(between)] * 1.2, tracked[int(between)][::-1]):
        with pytest.raises(AssertionError):
            check_follows(wrong, calls, measured)


def test_a_side_that_is_never_used_stays_zero() -> None:
    rng = np.random.default_rng(0)
    calls = [[summary_of(rng.uniform(0, 1, 500) / (k + 1)) for k in range(4)], [summary_of(np.zeros(5))] * 4]
    ranges = np.concatenate([extremes(c) for c in calls])
    found = learned_ranges(calls, ranges, UINT8, (30, 20, 10, 0), 40, clip_weight=4.0, seed=0)
    assert not np.any(found[0, :, 0])
    assert np.all(found[0, :, 1] > 0)
    assert not np.any(found[1])


def test_a_larger_weight_on_clipping_clips_less() -> None:
    calls = [[drifting(t) for t in TIMESTEPS[::4]]]

    def width(clip_weight: float) -> float:
        found = learned_ranges(calls, extremes(calls[0]), SMALL, TIMESTEPS[::4], SPAN, clip_weight=clip_weight, seed=0)
        return float((found[..., 1] - found[..., 0]).sum())

    assert width(1.0) < width(4.0) < width(40.0)


def test_the_seed_decides_every_byte() -> None:
    calls = [[drifting(t, v) for t in TIMESTEPS[::6]] for v in range(17)]
    ranges = np.concatenate([extremes(c) for c in calls])
    reported: list[tuple[int, int]] = []
    learn = partial(learned_ranges, calls, ranges, UINT8, TIMESTEPS[::6], SPAN, clip_weight=4.0)
    first = learn(seed=3, progress=lambda done, total: reported.append((done, total)))
    assert first.shape == (17, len(TIMESTEPS[::6]), 2)
    assert learn(seed=3).tobytes() == first.tobytes()
    assert learn(seed=4).tobytes() != first.tobytes()
    assert reported == sorted(reported)
    assert reported[-1][0] == reported[-1][1]
