"""Summaries: the merge is the summary of the union, and what they say is what numpy says of the whole data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mezzotint.compiler.calibration.collect import Collector
from mezzotint.compiler.core.stats import BIN_HIGH, BIN_LOW, Stats, Summary
from mezzotint.compiler.errors import StatsError

Values = npt.NDArray[np.float32]
BIN = 1 / 16  # a bin's width relative to its values: four bits of mantissa
SMALLEST, LARGEST = -24, 17  # magnitudes under 2^SMALLEST and above 2^LARGEST share the end bins
values = arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False))


def summary_of(*parts: Values) -> Summary:
    made = Summary()
    for part in parts:
        made.add(part)
    return made


def check_equal(a: Summary, b: Summary) -> None:
    assert (a.count, a.low, a.high) == (b.count, b.low, b.high)
    np.testing.assert_array_equal(a.histogram, b.histogram)
    np.testing.assert_allclose([a.total, a.square], [b.total, b.square], rtol=1e-9, atol=1e-6)


@given(a=values, b=values)
def test_the_merge_is_the_summary_of_the_union(a: Values, b: Values) -> None:
    together = summary_of(np.concatenate([a, b]))
    check_equal(summary_of(a) + summary_of(b), together)
    check_equal(summary_of(a, b), together)
    check_equal(summary_of(b) + summary_of(a), together)


def test_a_merge_with_values_that_are_one_percent_off_is_seen() -> None:
    a, b = (np.random.default_rng(i).standard_normal(100).astype(np.float32) for i in range(2))
    with pytest.raises(AssertionError):
        check_equal(summary_of(a) + summary_of(b * np.float32(1.01)), summary_of(np.concatenate([a, b])))


@given(values)
def test_moments_and_extremes_are_numpys(x: Values) -> None:
    made = summary_of(x)
    assert (made.count, made.low, made.high) == (x.size, x.min(), x.max())
    wide = x.astype(np.float64)
    np.testing.assert_allclose([made.total, made.square], [wide.sum(), (wide**2).sum()], rtol=1e-6, atol=1e-6)
    assert made.finite


@given(values)
def test_every_value_falls_into_a_bin_that_holds_it(x: Values) -> None:
    made = summary_of(x)
    assert made.histogram.sum() == x.size
    low, high, counts = made.bins()
    assert np.all(np.diff(low) >= 0)
    assert np.all(low <= high)
    for value in x:
        assert np.any((low <= value) & (value <= high))
    np.testing.assert_array_equal(counts, [np.count_nonzero(_bin_of(x) == b) for b in _ordered(x)])


def _bin_of(x: Values) -> npt.NDArray[np.int64]:
    """The place of each value's bin: counted from the sign, the exponent and four bits of mantissa, ends shared."""
    mantissa, exponent = np.frexp(np.abs(x.astype(np.float64)))  # |x| = mantissa 2^exponent, mantissa in [0.5, 1)
    key = 16 * (exponent.astype(np.int64) - 1) + ((mantissa * 2 - 1) * 16).astype(np.int64)
    key = np.clip(np.where(x == 0, -(10**6), key), 16 * SMALLEST, 16 * LARGEST - 1) - 16 * SMALLEST
    return np.asarray(key + np.where(np.signbit(x), 16 * (LARGEST - SMALLEST), 0), np.int64)


def _ordered(x: Values) -> list[int]:
    return sorted(set(_bin_of(x).tolist()), key=lambda b: float(BIN_LOW[b]))


def test_bins_of_negative_values_ascend() -> None:
    x = np.array([-8, -4, -1, -0.5, 0, 0.5, 1, 4], np.float32)
    low, high, counts = summary_of(x).bins()
    np.testing.assert_array_equal(counts, np.ones(len(x)))
    assert np.all((low <= x) & (x <= high))
    nearest = np.minimum(np.abs(BIN_LOW), np.abs(BIN_HIGH))
    inner = np.isfinite(BIN_LOW) & np.isfinite(BIN_HIGH) & (nearest > 0)
    assert np.count_nonzero(~inner) == 4, "two end bins for each sign"
    assert np.all((BIN_HIGH - BIN_LOW)[inner] <= BIN * nearest[inner])


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_very_small_or_very_large_shares_a_bin(sign: int) -> None:
    small = sign * np.array([0.0, 1e-38, 1e-20, 2.0**-24], np.float32)
    large = sign * np.array([2.0**17 - 1, 2.0**17, 1e20, 3e38], np.float32)
    for x in (small, large):
        made = summary_of(x)
        low, high, counts = made.bins()
        np.testing.assert_array_equal(counts, [4])
        assert (low[0], high[0]) == (made.low, made.high) == (x.min(), x.max())
    low, high, counts = summary_of(small, large).bins()
    np.testing.assert_array_equal(counts, [4, 4])
    assert np.all(low <= high)
    apart = summary_of(sign * np.array([2.0**-24, 1.07 * 2.0**-24], np.float32))
    assert len(apart.bins()[2]) == 2


@given(values, st.floats(0, 1))
def test_percentiles_stay_between_the_extremes(x: Values, share: float) -> None:
    made = summary_of(x)
    assert made.low <= made.percentile(share) <= made.high


@given(values, st.floats(0, 1), st.floats(0, 1))
def test_percentiles_ascend(x: Values, a: float, b: float) -> None:
    made = summary_of(x)
    slack = 1e-9 * max(abs(made.low), abs(made.high))
    assert made.percentile(min(a, b)) <= made.percentile(max(a, b)) + slack


def check_percentile(x: Values, got: float, share: float) -> None:
    """Within a bin's width of the values that numpy finds around that place."""
    around = [float(np.quantile(x, share, method=m)) for m in ("lower", "higher")]
    slack = BIN * max(abs(v) for v in around)
    assert around[0] - slack <= got <= around[1] + slack


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_percentiles_are_numpys_within_a_bin(share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(5000) * np.exp(rng.standard_normal(5000)) - 1).astype(np.float32)
    got = summary_of(x).percentile(share)
    check_percentile(x, got, share)
    with pytest.raises(AssertionError):
        check_percentile(x, got + 3 * BIN * max(abs(got), 0.1), share)


def test_the_outermost_percentiles_are_the_extremes() -> None:
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    made = summary_of(x)
    assert (made.percentile(0.0), made.percentile(1.0)) == (made.low, made.high)


def test_what_is_not_finite_is_reported() -> None:
    assert summary_of(np.ones(3, np.float32)).finite
    assert not summary_of(np.array([1, np.nan], np.float32)).finite
    assert not summary_of(np.array([1, np.inf], np.float32)).finite


def test_an_empty_array_changes_nothing() -> None:
    check_equal(summary_of(np.ones(3, np.float32), np.zeros(0, np.float32)), summary_of(np.ones(3, np.float32)))


def test_stats_merge_and_sum_over_groups() -> None:
    a, b = (np.random.default_rng(i).standard_normal(10).astype(np.float32) for i in range(2))
    first = Stats("d", 2, 1, {("x", 0): summary_of(a)})
    second = Stats("d", 2, 1, {("x", 0): summary_of(b), ("x", 1): summary_of(a), ("y", 1): summary_of(b)})
    merged = first + second
    assert merged.calls == 2
    assert list(merged.values()) == ["x", "y"]
    check_equal(merged.summaries["x", 0], summary_of(a, b))
    whole = merged.summary("x")
    assert whole is not None
    check_equal(whole, summary_of(a, b, a))
    assert merged.summary("z") is None
    check_equal(first.summaries["x", 0], summary_of(a))
    for other in (Stats("other", 2, 1, {}), Stats("d", 3, 1, {}), Stats("d", 2, 1, {}, (9, 0))):
        with pytest.raises(ValueError, match="do not add"):
            first + other


def check_blocks(x: Values, factor: float = 1.0) -> None:
    """An array of several blocks is summarized like its pieces, and like numpy does."""
    whole = summary_of(x)
    check_equal(whole, summary_of(*np.array_split(x * np.float32(factor), 7)))
    wide = x.astype(np.float64)
    np.testing.assert_allclose([whole.total, whole.square], [wide.sum(), (wide**2).sum()], rtol=1e-9)
    np.testing.assert_array_equal(whole.histogram, np.bincount(_bin_of(x), minlength=len(BIN_LOW)))


@pytest.mark.parametrize("size", [65535, 65536, 65537, 200_001])
def test_arrays_larger_than_a_block(size: int) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    check_blocks(x)
    with pytest.raises(AssertionError):
        check_blocks(x, factor=1.01)


def test_the_same_values_always_give_the_same_bits() -> None:
    x = np.random.default_rng(1).standard_normal(300_000).astype(np.float32)
    first, again = summary_of(x), summary_of(x.reshape(3, 100, 1000))
    assert (first.total, first.square) == (again.total, again.square)


TIMES = (900, 700, 500, 300, 100)


def measured(groups: tuple[int, ...], timesteps: tuple[int, ...] = TIMES) -> Stats:
    return Stats("d", len(timesteps), 9, {("x", g): summary_of(np.ones(3, np.float32)) for g in groups}, timesteps)


def test_statistics_of_every_call_pass() -> None:
    measured((0, 1, 2, 3, 4)).check_every_call(TIMES, "here")
    Stats("d", 5, 9, measured((0, 1, 2, 3, 4)).summaries).check_every_call(TIMES, "here")


@pytest.mark.parametrize(
    ("stats", "wanted", "message"),
    [
        (measured((0, 1, 3, 4)), TIMES, r"1 of 5 timesteps were never calibrated: 500 \(nearest calibrated: 300\)"),
        (measured((0,)), TIMES, r"4 of 5 .*: 700 \(nearest calibrated: 900\), 500 \(.*900\), 300 .*, 100 "),
        (measured((0, 1, 2, 3, 4)), (900, 710, 500, 300, 100), r"1 of 5 .*: 710 \(nearest calibrated: 700\)"),
        (measured((0, 1, 2, 3, 4)), tuple(range(80, 0, -10)), r"8 of 8 .*: 80 \(.*: 100\), 70 .*, 40 .*, and 3 more"),
        (measured((0, 1, 2, 3, 4)), TIMES[::2], "statistics of 5 network calls for a deployment that makes 3"),
        (measured(()), TIMES, "5 of 5 timesteps were never calibrated: 900, 700, 500, 300, 100"),
        (Stats("d", 2, 9, {}, TIMES), TIMES, "statistics of 2 groups for 5 network calls"),
        (Stats("d", 2, 9, {}), TIMES, "statistics of 2 groups for 5 network calls"),
    ],
)
def test_calls_that_were_never_calibrated_are_named(stats: Stats, wanted: tuple[int, ...], message: str) -> None:
    with pytest.raises(StatsError, match=message) as caught:
        stats.check_every_call(wanted, "group_steps")
    assert caught.value.where == "group_steps"
    assert "observe" in str(caught.value.hint)


@given(st.lists(arrays.arrays(np.float32, (6, 3), elements=st.floats(-9, 9, width=32)), min_size=2, max_size=2))
def test_extremes_of_channels_merge(parts: list[Values]) -> None:
    def stats(seen: Values, *others: str) -> Stats:
        extremes = np.stack([seen.min(axis=0), seen.max(axis=0)])
        return Stats("d", 1, 1, {}, (), {(name, 0): extremes for name in ("both", *others)})

    merged = stats(parts[0], "left") + stats(parts[1], "right")
    together = np.concatenate(parts)
    want = np.stack([together.min(axis=0), together.max(axis=0)])
    np.testing.assert_array_equal(merged.channels["both", 0], want)
    np.testing.assert_array_equal(merged.channels["left", 0], stats(parts[0]).channels["both", 0])
    np.testing.assert_array_equal(merged.channels["right", 0], stats(parts[1]).channels["both", 0])


images = st.integers(1, 3).flatmap(
    lambda n: arrays.arrays(np.float32, (n, 3, 2), elements=st.floats(-100, 100, width=32, allow_subnormal=False))
)


def channel_stats(*parts: Values, axis: int = 1, group: int = 0) -> Stats:
    """What is known of a value `x` after these arrays `[n, 3, 2]`, each channel by itself."""
    with Collector({"x": axis}, squared=["x"]) as collector:
        for part in parts:
            collector.add(group, 1, {"x": part})
        collector.settle()
        measured = collector.summaries, (9, 5), collector.channels, collector.squares, {"x": axis}
        return Stats("graph", 2, len(parts), *measured)


def check_same_channels(a: Stats, b: Stats) -> None:
    one, other = a.extremes("x", 1), b.extremes("x", 1)
    assert one is not None and other is not None
    np.testing.assert_array_equal(one, other)
    squares = a.mean_squares("x", 1), b.mean_squares("x", 1)
    assert squares[0] is not None and squares[1] is not None
    np.testing.assert_allclose(squares[0], squares[1], rtol=1e-12)


@given(a=images, b=images)
def test_the_merge_of_channels_is_that_of_the_union(a: Values, b: Values) -> None:
    together = channel_stats(np.concatenate([a, b]))
    check_same_channels(channel_stats(a) + channel_stats(b), together)
    check_same_channels(channel_stats(b) + channel_stats(a), together)
    mean = together.mean_squares("x", 1)
    assert mean is not None
    both = np.concatenate([a, b]).astype(np.float64)
    np.testing.assert_allclose(mean, (both**2).mean(axis=(0, 2)), rtol=1e-12, atol=1e-300)


def test_a_merge_of_channels_that_is_one_percent_off_is_seen() -> None:
    a, b = (np.random.default_rng(i).standard_normal((2, 3, 2)).astype(np.float32) for i in range(2))
    with pytest.raises(AssertionError):
        check_same_channels(channel_stats(a) + channel_stats(b), channel_stats(a, b * np.float32(1.01)))


def test_groups_of_channels_are_weighted_by_their_counts() -> None:
    few, many = np.full((1, 3, 2), 2, np.float32), np.full((3, 3, 2), 1, np.float32)
    stats = channel_stats(few) + channel_stats(many, group=1)
    extremes = stats.extremes("x", 1)
    assert extremes is not None and extremes.shape == (2, 2, 3)
    np.testing.assert_array_equal(extremes[:, 0, 0], [2, 1])
    np.testing.assert_array_equal(stats.mean_squares("x", 1), np.full(3, (4 + 3 * 1) / 4))


def test_channels_along_another_axis_are_not_known() -> None:
    x = np.ones((2, 3, 2), np.float32)
    stats = channel_stats(x)
    assert stats.extremes("x", -1) is None and stats.mean_squares("x", -1) is None
    assert stats.extremes("y", 1) is None and stats.mean_squares("y", 1) is None
    with pytest.raises(ValueError, match="different axes"):
        stats + channel_stats(x, axis=-1)
