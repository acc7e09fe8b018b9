"""smoothing: the expected error by slow loops and by real rounding; the algebra of dilation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mezzotint.compiler.core.formats import Format, dequantize, quantize, scale_for_range
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rescaling.rank_one import input_vector, rank_one
from mezzotint.compiler.rescaling.smoothing import (
    COARSE_SHRINKS,
    Evidence,
    GroupedWeight,
    Widths,
    dilation,
    powers_of_two,
    tamed,
)
from mezzotint.runtime.arrays import Floats

CASES: dict[str, tuple[str, tuple[int, ...]]] = {
    "conv": ("Conv <pads = [1, 1, 1, 1]>", (5, 6, 3, 3)),
    "grouped": ("Conv <group = 3, pads = [1, 1, 1, 1]>", (9, 2, 3, 3)),
    "depthwise": ("Conv <group = 6, pads = [1, 1, 1, 1]>", (6, 1, 3, 3)),
    "matmul": ("MatMul", (6, 5)),
    "turned": ("Gemm <transB = 1>", (5, 6)),
}
CHANNELS = 6


def weights_of(case: str, array: Floats) -> GroupedWeight:
    op = CASES[case][0]
    x = "1,6,5,5" if "Conv" in op else "3,6"
    size = ",".join(str(n) for n in array.shape)
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[{x}] x) => (float y) <float[{size}] w> {{ y = {op} (x, w) }}""")
    value = model.graph[0].inputs[1]
    assert value is not None
    value.const_value = ir.tensor(array, name="w")
    model.graph.register_initializer(value)
    (layer,) = layers(model.graph)
    return GroupedWeight(layer)


def random_weight(case: str, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(CASES[case][1]).astype(np.float32)


def entries(case: str, array: Floats) -> list[tuple[int, int, float]]:
    """(row, input channel, weight) of everything that a layer multiplies."""
    found = []
    for index in np.ndindex(*array.shape):
        if case in ("grouped", "depthwise"):
            groups = {"grouped": 3, "depthwise": 6}[case]
            row, channel = index[0], index[0] // (len(array) // groups) * array.shape[1] + index[1]
        elif case == "matmul":
            channel, row = index[0], index[1]
        else:
            row, channel = index[0], index[1]
        found.append((row, channel, float(array[index])))
    return found


def slow_noise(
    case: str, array: Floats, squares: list[float], factors: list[float], widths: Widths, extremes: Any
) -> float:
    """E(s) / P, number by number."""
    every = entries(case, array)
    qmax = 2 ** (widths.weight_bits - 1) - 1
    rounding = activation = signal = 0.0
    for row in sorted({r for r, _, _ in every}):
        mine = [(c, w * factors[c]) for r, c, w in every if r == row]
        if widths.weight_bits == 1:
            power = [squares[c] / factors[c] ** 2 for c, _ in mine]
            size = sum(p * abs(w) for p, (_, w) in zip(power, mine, strict=True)) / sum(power)
            rounding += sum(p * (abs(w) - size) ** 2 for p, (_, w) in zip(power, mine, strict=True))
            continue
        limit = max(abs(w) for _, w in mine)
        tried = []
        for shrink in COARSE_SHRINKS if widths.clipped else (1.0,):
            step = limit * shrink / qmax
            errors = [(c, max(-qmax, min(qmax, round(w / step))) * step - w) for c, w in mine]
            tried.append((sum(e * e for _, e in errors), errors))
        _, errors = min(tried, key=lambda pair: pair[0])
        rounding += sum(squares[c] * e * e / factors[c] ** 2 for c, e in errors)
    ends = [(min(0.0, *(lo / f for lo, f in zip(low, factors, strict=True))),
             max(0.0, *(hi / f for hi, f in zip(high, factors, strict=True)))) for low, high in extremes]  # fmt: skip
    if not widths.timed:
        ends = [(min(low for low, _ in ends), max(high for _, high in ends))]
    levels = 2**widths.activation_bits - 1
    step_square = sum(((high - low) / levels) ** 2 for low, high in ends) / len(ends)
    for _, channel, weight in every:
        activation += min(step_square / 12, squares[channel] / factors[channel] ** 2) * (factors[channel] * weight) ** 2
        signal += squares[channel] * weight**2
    return (rounding + activation) / signal


def made_up(calls: int = 3, seed: int = 5) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Extremes `[calls, 2, C]` and mean squares `[C]`."""
    rng = np.random.default_rng(seed)
    loud = np.exp(rng.standard_normal(CHANNELS))
    spread = rng.uniform(0.5, 1.5, (calls, 2, CHANNELS))
    return spread * loud * np.array([-2.0, 3.0])[None, :, None], loud**2


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("widths", [Widths(4, 8), Widths(6, 6, timed=False), Widths(3, 8, clipped=False), Widths(1, 8)])
def test_the_expected_noise_is_that_of_slow_loops(case: str, widths: Widths) -> None:
    array = random_weight(case)
    extremes, squares = made_up()
    factors = np.exp(np.random.default_rng(6).standard_normal(CHANNELS))
    evidence = Evidence(extremes, squares, [weights_of(case, array)], widths)
    got = evidence.noise(factors)
    loops = array, list(squares), list(factors), widths, extremes
    want = slow_noise(case, *loops)
    assert got == pytest.approx(want, rel=1e-5)
    assert got != pytest.approx(want * 1.01, rel=1e-5)
    for other in (squares[::-1], squares):
        turned = list(factors[::-1]) if other is squares else list(factors)
        assert got != pytest.approx(slow_noise(case, array, list(other), turned, widths, extremes), rel=1e-3)
    plain = slow_noise(case, array, list(squares), [1.0] * CHANNELS, widths, extremes)
    assert evidence.gain(factors) == pytest.approx(10 * np.log10(plain / want), abs=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_peaks_and_norms(case: str) -> None:
    array = random_weight(case)
    weights = weights_of(case, array)
    every = entries(case, array)
    for channel in range(CHANNELS):
        mine = [w for _, c, w in every if c == channel]
        assert weights.peaks()[channel] == pytest.approx(max(abs(w) for w in mine))
        assert weights.norms()[channel] == pytest.approx(sum(w * w for w in mine))
    assert weights.channels == CHANNELS


def test_two_readers_add_up() -> None:
    extremes, squares = made_up()
    a, b = (weights_of("matmul", random_weight("matmul", seed)) for seed in (1, 2))
    factors, widths = np.linspace(0.5, 2, CHANNELS), Widths(4, 8)
    each = [Evidence(extremes, squares, [w], widths).noise(factors) for w in (a, b)]
    both = Evidence(extremes, squares, [a, b], widths)
    assert both.noise(factors) == pytest.approx(sum(each))
    np.testing.assert_array_equal(both.weight_peaks, np.maximum(a.peaks(), b.peaks()))


def test_many_rows_are_sampled() -> None:
    array = np.random.default_rng(0).standard_normal((6, 3000)).astype(np.float32)
    extremes, squares = made_up()
    weights = weights_of("matmul", array)
    rows, each = weights.some_rows()
    assert (rows.shape, each) == ((1, 256, 6, 1), 3000 / 256)
    got = Evidence(extremes, squares, [weights], Widths(4, 8)).noise(np.ones(CHANNELS))
    want = slow_noise("matmul", array, list(squares), [1.0] * CHANNELS, Widths(4, 8), extremes)
    assert got == pytest.approx(want, rel=0.1)
    assert got != pytest.approx(want * each, rel=0.1)


@pytest.mark.parametrize("widths", [Widths(4, 8), Widths(6, 6), Widths(8, 4), Widths(4, 4)])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 1.0])
def test_the_expected_noise_is_that_of_real_rounding(widths: Widths, alpha: float | None) -> None:
    """A matmul with outlier channels, rounded as the plan would: within one decibel."""
    rng = np.random.default_rng(9)
    channels, rows, tokens = 64, 48, 4000
    loud = np.where(np.arange(channels) % 16 == 0, 20.0, 1.0)
    x = (rng.standard_normal((tokens, channels)) * loud).astype(np.float32)
    w = (rng.standard_normal((channels, rows)) / 8).astype(np.float32)
    extremes = np.stack([x.min(axis=0), x.max(axis=0)])[None].astype(np.float64)
    CASES["wide"] = ("MatMul", w.shape)
    weights = weights_of("wide", w)
    del CASES["wide"]
    evidence = Evidence(extremes, np.square(x, dtype=np.float64).mean(axis=0), [weights], widths)
    s = np.ones(channels)
    if alpha is not None:
        s = tamed(evidence.peaks.max(axis=0) ** alpha / evidence.weight_peaks ** (1 - alpha))
    scaled_x, scaled_w = (x / s).astype(np.float32), (w * s[:, None]).astype(np.float32)
    fmt = Format(widths.activation_bits)
    grid = scale_for_range(scaled_x.min(), scaled_x.max(), fmt)
    rough_x = dequantize(quantize(scaled_x, *grid, fmt), *grid)
    fmt = Format(widths.weight_bits, signed=True, symmetric=True)
    best = np.zeros_like(scaled_w)
    for column in range(rows):
        tried = []
        for shrink in COARSE_SHRINKS:
            limit = np.abs(scaled_w[:, column]).max() * shrink
            grid = scale_for_range(-limit, limit, fmt)
            tried.append(dequantize(quantize(scaled_w[:, column], *grid, fmt), *grid))
        best[:, column] = min(tried, key=lambda c: float(((c - scaled_w[:, column]) ** 2).sum()))
    want = float(((rough_x @ best - x @ w) ** 2).sum() / ((x @ w) ** 2).sum())
    assert abs(10 * np.log10(evidence.noise(s) / want)) < 1.0


def test_silence() -> None:
    extremes, squares = made_up()
    weights = weights_of("matmul", random_weight("matmul"))
    assert not Evidence(extremes, squares, [weights], Widths(4, 8)).silent
    assert Evidence(extremes * 0, squares * 0, [weights], Widths(4, 8)).silent
    assert Evidence(extremes, squares, [weights_of("matmul", np.zeros((6, 5), np.float32))], Widths(4, 8)).silent


def test_the_best_of_candidates() -> None:
    extremes, squares = made_up()
    evidence = Evidence(extremes, squares, [weights_of("matmul", random_weight("matmul"))], Widths(8, 4))
    loud = tamed(evidence.peaks.max(axis=0))
    best = evidence.best({"worse": 1 / loud, "even": loud})
    assert best is not None
    name, factors, gain = best
    assert (name, gain) == ("even", evidence.gain(loud)) and gain > 0
    np.testing.assert_array_equal(factors, loud)
    assert evidence.best({}) is None


positive = arrays.arrays(np.float64, st.integers(1, 8), elements=st.floats(1e-6, 1e6))


@given(positive)
def test_tamed_factors(factors: npt.NDArray[np.float64]) -> None:
    made = tamed(factors)
    assert np.all((made >= 2.0**-12) & (made <= 2.0**12))
    if made.min() > 2.0**-12 and made.max() < 2.0**12:
        assert np.log(made).mean() == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(made / made[0], factors / factors[0], rtol=1e-9)


@given(positive)
def test_powers_of_two(factors: npt.NDArray[np.float64]) -> None:
    made = powers_of_two(factors)
    assert np.all(np.frexp(made)[0] == 0.5)
    assert np.all((made <= factors * np.sqrt(2) * 1.001) & (made >= factors / np.sqrt(2) / 1.001))


matrices = arrays.arrays(
    np.float32, (CHANNELS, 5), elements=st.floats(-8, 8, width=32, allow_subnormal=False).map(np.float32)
)


def ends(array: Floats, symmetric: bool) -> Floats:
    """The ranges of the columns of `[C, rows]`."""
    if symmetric:
        return np.asarray(np.abs(array).max(axis=0))
    return np.stack([np.minimum(array.min(axis=0), 0), np.maximum(array.max(axis=0), 0)])


@given(array=matrices, symmetric=st.booleans())
def test_dilation_keeps_every_range(array: Floats, symmetric: bool) -> None:
    s = dilation([weights_of("matmul", array)], symmetric=symmetric)
    assert np.all(s >= 1) and np.all(np.isfinite(s))
    grown = (array * s[:, None]).astype(np.float32)
    np.testing.assert_array_equal(ends(grown, symmetric), ends(array, symmetric))
    for k in range(CHANNELS):
        if np.any(array[k]):
            more = grown.copy()
            more[k] *= np.float32(1.01)
            assert not np.array_equal(ends(more, symmetric), ends(array, symmetric))  # s_k is the largest
        else:
            assert s[k] == 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dilation_is_that_of_slow_loops(case: str, symmetric: bool) -> None:
    """The formula of the paper, with its set of channels that attain an end of a row."""
    array = random_weight(case, 3)
    every = entries(case, array)
    rows: dict[int, tuple[float, float]] = {}
    for row, _, w in every:
        low, high = rows.get(row, (0.0, 0.0))
        rows[row] = (min(low, w), max(high, w))
    if symmetric:
        rows = {row: (-max(-low, high), max(-low, high)) for row, (low, high) in rows.items()}
    want = []
    for channel in range(CHANNELS):
        mine = [(row, w) for row, c, w in every if c == channel]
        if any(w in rows[row] for row, w in mine):
            want.append(1.0)
        else:
            want.append(min(rows[row][1 if w > 0 else 0] / w for row, w in mine if w))
    got = dilation([weights_of(case, array)], symmetric=symmetric)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got * np.array([1.01, *[1] * 5]), want, rtol=1e-5)


def test_dilation_of_two_readers_fits_both() -> None:
    a, b = (random_weight("matmul", seed) for seed in (1, 2))
    a[0] /= 4
    b[0] /= 2
    each = [dilation([weights_of("matmul", w)], symmetric=True) for w in (a, b)]
    both = dilation([weights_of("matmul", w) for w in (a, b)], symmetric=True)
    np.testing.assert_array_equal(both, np.minimum(*each))
    assert both[0] > 1


def test_dilation_of_many_rows_is_that_of_its_blocks() -> None:
    array = np.random.default_rng(0).standard_normal((6, 700)).astype(np.float32)
    array[2] /= 100
    whole = dilation([weights_of("matmul", array)], symmetric=True)
    parts = [dilation([weights_of("matmul", array[:, i : i + 70])], symmetric=True) for i in range(0, 700, 70)]
    np.testing.assert_array_equal(whole, np.min(parts, axis=0))
    assert whole[2] > 10


def test_rank_one_is_the_largest_singular_value() -> None:
    """OneBit's SVID: by numpy's SVD, and with the least error beside vectors that are off by a little."""
    rng = np.random.default_rng(0)
    matrix = np.abs(rng.standard_normal((7, 5))) * np.exp(rng.standard_normal(5))
    a, b = rank_one(matrix)
    left, sizes, right = np.linalg.svd(matrix)
    np.testing.assert_allclose(np.outer(a, b), sizes[0] * np.outer(left[:, 0], right[0]), rtol=1e-6)
    assert (a > 0).all() and (b > 0).all() and np.linalg.norm(b) == pytest.approx(1)
    mean = np.outer(matrix.mean(axis=1), matrix.mean(axis=0)) / matrix.mean()
    assert np.square(matrix - np.outer(a, b)).sum() < np.square(matrix - mean).sum()
    assert not np.any(rank_one(np.zeros((3, 2)))[0])


@pytest.mark.parametrize("case", ["conv", "grouped", "matmul", "turned"])
def test_the_vector_of_the_inputs_is_that_of_the_mean_magnitudes(case: str) -> None:
    array = random_weight(case)
    means = np.zeros((9 if case == "grouped" else 5, CHANNELS))
    for row, channel, weight in entries(case, array):
        means[row, channel] += abs(weight) / (9 if case in ("conv", "grouped") else 1)
    found = input_vector([weights_of(case, array)])
    for channels in [[0, 1], [2, 3], [4, 5]] if case == "grouped" else [list(range(6))]:
        part = means[means[:, channels].any(axis=1)][:, channels]
        want = np.abs(np.linalg.svd(part)[2][0])
        np.testing.assert_allclose(found[channels], want / np.exp(np.log(want).mean()), rtol=1e-5)


def test_layers_that_read_one_value_share_the_vector() -> None:
    first, second = random_weight("turned", 1), random_weight("turned", 2)
    found = input_vector([weights_of("turned", first), weights_of("turned", second)])
    want = np.abs(np.linalg.svd(np.abs(np.concatenate([first, second])).astype(np.float64))[2][0])
    np.testing.assert_allclose(found, want / np.exp(np.log(want).mean()), rtol=1e-5)
    silent = first.copy()
    silent[:, 3] = 0
    assert 0 < input_vector([weights_of("turned", silent)])[3] < 1e-3
    assert (
        input_vector([weights_of("conv", random_weight("conv")), weights_of("grouped", random_weight("grouped"))]) == 1
    ).all()
