"""Ranges: the three methods against brute force over the raw values."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.core.formats import UINT8, dequantize, quantize, scale_for_range
from mezzotint.compiler.core.stats import Summary
from mezzotint.compiler.scales.ranges import RANGE_SHRINKS, expected_error, least_error_range, range_of
from mezzotint.runtime.arrays import Floats

KINDS = ["normal", "silu", "outliers", "heavy", "negative"]


def measured(values: Floats) -> Summary:
    summary = Summary()
    summary.add(values)
    return summary


def real_error(values: Floats, low: float, high: float) -> float:
    """Mean squared error of really quantizing the values over a range."""
    scale, zero = scale_for_range(low, high, UINT8)
    back = dequantize(quantize(values, scale, zero, UINT8), scale, zero)
    return float(np.mean((back.astype(np.float64) - values) ** 2))


def samples(kind: str) -> Floats:
    rng = np.random.default_rng(4)
    chosen = {
        "normal": rng.standard_normal(20000),
        "silu": (y := rng.standard_normal(20000) * 2) / (1 + np.exp(-y)),
        "outliers": np.concatenate([rng.standard_normal(20000) * 0.1, [-30.0, 40.0]]),
        "heavy": rng.standard_t(2, 20000),
        "negative": -np.abs(rng.standard_normal(20000)),
    }[kind]
    return np.asarray(chosen, np.float32)


def check_is_best(x: Floats, low: float, high: float) -> None:
    """Not more than 5 % above the least error of all shrunk ranges, found by trying them on the values themselves."""
    bottom, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    best = min(real_error(x, bottom * s, top * s) for s in RANGE_SHRINKS)
    assert real_error(x, low, high) <= 1.05 * best


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_brute_force(kind: str) -> None:
    x = samples(kind)
    low, high = least_error_range(measured(x), UINT8)
    assert low <= 0 <= high
    check_is_best(x, low, high)


def test_a_range_that_is_far_from_the_best_is_seen() -> None:
    x = samples("heavy")
    low, high = least_error_range(measured(x), UINT8)
    with pytest.raises(AssertionError):
        check_is_best(x, low * 1.5, high * 1.5)
    with pytest.raises(AssertionError):
        check_is_best(x, low * 0.6, high * 0.6)


def check_expected(x: Floats, scale: float) -> None:
    """Within a tenth of the error of really quantizing the values, over ranges that clip and ranges that do not."""
    bottom, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    for shrink in (1.0, 0.7, 0.4):
        real = real_error(x, bottom * shrink, top * shrink)
        assert abs(scale * expected_error(measured(x), bottom * shrink, top * shrink, UINT8) / real - 1) < 0.1


@pytest.mark.parametrize("kind", ["normal", "negative"])
def test_the_expected_error_is_the_real_one(kind: str) -> None:
    check_expected(samples(kind), 1.0)
    with pytest.raises(AssertionError):
        check_expected(samples(kind), 1.25)


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_and_percentile_are_the_summarys(kind: str) -> None:
    summary = measured(samples(kind))
    assert range_of(summary, "minmax", 99.0, UINT8) == (summary.low, summary.high)
    low, high = range_of(summary, "percentile", 99.0, UINT8)
    assert (low, high) == pytest.approx((summary.percentile(0.005), summary.percentile(0.995)), rel=1e-9)
    assert summary.low <= low <= high <= summary.high
    assert range_of(summary, "mse", 99.0, UINT8) == least_error_range(summary, UINT8)


def test_a_value_that_is_always_zero_has_a_range() -> None:
    assert least_error_range(measured(np.zeros(5, np.float32)), UINT8) == (0.0, 0.0)
