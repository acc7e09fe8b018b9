"""The collector: what a plain loop over the values would have summed, to the last bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.compiler.calibration.collect import Collector
from mezzotint.compiler.core.stats import Summary
from mezzotint.compiler.errors import StatsError

Values = dict[str, npt.NDArray[np.float32]]
CALLS = 9
GROUPS = 3


def call(k: int, factor: float = 1.0) -> Values:
    rng = np.random.default_rng(k)
    sizes = {"wide": (4, 30_000), "small": (4, 3)}
    return {name: (rng.standard_normal(shape) * factor).astype(np.float32) for name, shape in sizes.items()}


def collected(factor: float = 1.0) -> dict[tuple[str, int], Summary]:
    with Collector() as collector:
        for k in range(CALLS):
            collector.add(k % GROUPS, k, call(k, factor))
        collector.settle()
        return collector.summaries


def check_plain_loop(summaries: dict[tuple[str, int], Summary]) -> None:
    plain: dict[tuple[str, int], Summary] = {}
    for k in range(CALLS):
        for name, array in call(k).items():
            plain.setdefault((name, k % GROUPS), Summary()).add(array)
    assert list(summaries) == list(plain)
    for key, want in plain.items():
        got = summaries[key]
        for field in ("count", "low", "high", "total", "square"):
            assert getattr(got, field) == getattr(want, field)
        np.testing.assert_array_equal(got.histogram, want.histogram)


def test_summaries_are_those_of_a_plain_loop() -> None:
    check_plain_loop(collected())
    with pytest.raises(AssertionError):
        check_plain_loop(collected(factor=1.01))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    broken = np.ones((2, 3), np.float32)
    broken[1, 1] = bad
    with Collector() as collector:
        collector.add(0, 77, {"fine": np.ones(3, np.float32), "broken": broken})
        with pytest.raises(StatsError, match="timestep 77") as caught:
            collector.settle()
        assert caught.value.where == "value broken"
    with Collector() as collector:
        collector.add(0, 77, {"broken": broken})
        with pytest.raises(StatsError):  # at the latest when the next call comes
            collector.add(0, 66, call(0))


def test_other_number_types_are_summarized_as_float() -> None:
    with Collector() as collector:
        collector.add(0, 1, {"x": np.arange(5, dtype=np.float16), "y": np.arange(3)})
        collector.settle()
        assert (collector.summaries["x", 0].high, collector.summaries["y", 0].total) == (4.0, 3.0)


def test_an_error_of_the_caller_leaves_no_thread_behind() -> None:
    collector = Collector()
    with pytest.raises(KeyError), collector:
        collector.add(0, 1, call(0))
        raise KeyError
    with pytest.raises(RuntimeError):
        collector.add(0, 1, call(0))


def image(k: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(k).standard_normal((2, 5, 3, 4)).astype(np.float32)


AXES = {"image": 1, "tokens": -1}


def tokens(k: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(100 + k).standard_normal((2, 3, 7)).astype(np.float32)


def check_channels(collector: Collector, factor: float = 1.0) -> None:
    """Extremes to the last bit, sums of squares as numpy has them in float64."""
    assert set(collector.channels) == {(name, group) for name in AXES for group in range(GROUPS)}
    assert set(collector.squares) == {("tokens", group) for group in range(GROUPS)}
    for (name, group), got in collector.channels.items():
        made = image if name == "image" else tokens
        seen = np.concatenate([made(k) for k in range(CALLS) if k % GROUPS == group])
        rows = np.moveaxis(seen, AXES[name], 0).reshape(seen.shape[AXES[name]], -1)
        np.testing.assert_array_equal(got, np.stack([rows.min(axis=1), rows.max(axis=1)]) * np.float32(factor))
        if name == "tokens":
            want = (rows.astype(np.float64) ** 2).sum(axis=1)
            np.testing.assert_allclose(collector.squares[name, group] * factor, want, rtol=1e-12)


def test_channels_are_numpys() -> None:
    with Collector(AXES, squared=["tokens"]) as collector:
        for k in range(CALLS):
            collector.add(k % GROUPS, k, {"image": image(k), "tokens": tokens(k), **call(k)})
        collector.settle()
        check_channels(collector)
        with pytest.raises(AssertionError):
            check_channels(collector, factor=1.01)
        assert ("wide", 0) in collector.summaries
        key = ("tokens", 1)
        collector.squares[key] = collector.squares[key] * 1.01
        with pytest.raises(AssertionError):
            check_channels(collector)


@pytest.mark.parametrize(("shape", "axis"), [((3, 4), 1), ((3, 4, 5), 1), ((3, 4), -1), ((2, 3, 4, 5), -1)])
def test_channels_of_any_rank(shape: tuple[int, ...], axis: int) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with Collector({"x": axis}, squared=["x"]) as collector:
        collector.add(0, 1, {"x": values})
        collector.settle()
        rows = np.moveaxis(values, axis, 0).reshape(shape[axis], -1)
        np.testing.assert_array_equal(collector.channels["x", 0], np.stack([rows.min(axis=1), rows.max(axis=1)]))
        np.testing.assert_allclose(collector.squares["x", 0], np.square(rows, dtype=np.float64).sum(axis=1))


def test_squares_beyond_the_range_of_float32() -> None:
    with Collector({"x": 1}, squared=["x"]) as collector:
        collector.add(0, 1, {"x": np.full((1, 2), 1e30, np.float32)})
        collector.settle()
        np.testing.assert_allclose(collector.squares["x", 0], 1e60, rtol=1e-6)
