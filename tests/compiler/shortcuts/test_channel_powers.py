"""compiler/shortcuts/channel_powers.py: powers of two for the channels of a layer's input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mezzotint.compiler.core.formats import INT8, UINT8, Format, dequantize, quantize, scale_for_range
from mezzotint.compiler.shortcuts.channel_powers import ChannelErrors
from mezzotint.runtime.arrays import Doubles

LOUD = 2.0 ** np.array([0, 5, 0, 3, 0, 5, 1, 0])
POSITIONS = 4096


def inputs() -> Doubles:
    """Uniform values `[C, positions]` of channels that differ by up to 32."""
    rng = np.random.default_rng(7)
    values: Doubles = rng.uniform(-1, 1, (len(LOUD), POSITIONS)) * LOUD[:, None]
    return values


def errors_of(x: Doubles, weight: Doubles, bits: int = 8) -> ChannelErrors:
    low, high, square = x.min(axis=1), x.max(axis=1), np.square(x).mean(axis=1)
    power = np.square(weight[:, :, 0] @ x).mean()
    fmt = UINT8 if bits == 8 else Format(bits)
    return ChannelErrors(low[None], high[None], square[None], np.array([power]), weight, fmt, INT8)


def real_error(x: Doubles, weight: Doubles, exponents: Doubles) -> float:
    """The relative squared error of the layer when it is really quantized."""
    factors = 2.0**exponents
    divided, columns = (x / factors[:, None]).astype(np.float32), (weight[:, :, 0] * factors).astype(np.float32)
    scale, zero = scale_for_range(divided.min(), divided.max(), UINT8)
    x_grid = dequantize(quantize(divided, scale, zero, UINT8), scale, zero)
    w_scale = (np.abs(columns).max(axis=1) / INT8.qmax).astype(np.float32)
    w_zero = np.zeros(len(columns), np.int8)
    w_grid = dequantize(quantize(columns, w_scale, w_zero, INT8, axis=0), w_scale, w_zero, axis=0)
    exact = weight[:, :, 0] @ x
    return float(np.square(w_grid.astype(np.float64) @ x_grid - exact).mean() / np.square(exact).mean())


@pytest.mark.parametrize("balanced", [False, True])
def test_the_expected_error_is_that_of_the_quantized_layer(balanced: bool) -> None:
    x = inputs()
    weight = np.random.default_rng(8).standard_normal((16, len(LOUD), 1)) / (LOUD[:, None] if balanced else 1.0)
    errors = errors_of(x, weight)
    for exponents in (np.zeros(len(LOUD)), np.log2(LOUD), errors.best()):
        assert errors.of(exponents) == pytest.approx(real_error(x, weight, exponents), rel=0.25)


def test_channels_that_matter_equally_are_made_equal() -> None:
    x = inputs()
    weight = np.random.default_rng(9).standard_normal((16, len(LOUD), 1)) / LOUD[:, None]
    errors = errors_of(x, weight)
    best = errors.best()

    assert np.array_equal(best, np.rint(best))  # whole octaves
    assert 10 * np.log10(real_error(x, weight, np.zeros(len(LOUD))) / real_error(x, weight, best)) > 6
    spread = np.log2(LOUD) - best
    assert np.ptp(spread) <= 1


def test_nothing_moves_where_nothing_is_gained() -> None:
    x = inputs() / LOUD[:, None]
    weight = np.random.default_rng(10).standard_normal((16, len(LOUD), 1))
    errors = errors_of(x, weight)
    assert errors.of(errors.best()) <= errors.of(np.zeros(len(LOUD)))
    assert errors.of(np.full(len(LOUD), 2.0)) == pytest.approx(errors.of(np.zeros(len(LOUD))), rel=1e-9)
    assert not np.ptp(errors.best())


def test_what_weights_lose_counts_at_every_call() -> None:
    """Powers that gain a little in one call cost more along many: the weights' error is the same at each of them."""
    x = inputs()
    weight = np.random.default_rng(11).standard_normal((16, len(LOUD), 1))
    errors = errors_of(x, weight)
    low, high, square, power = (
        np.repeat(a, 50, axis=0) for a in (errors.low, errors.high, errors.square, errors.power)
    )
    many = replace(errors, low=low, high=high, square=square, power=power)
    even = np.zeros(len(LOUD))
    chosen, along = errors.best(), many.best()
    assert many.of(chosen) == pytest.approx(errors.of(chosen)) and errors.of(chosen) < errors.of(even)
    assert np.ptp(chosen) and many.of(chosen, 50) > many.of(along, 50)
    assert np.ptp(along) < np.ptp(chosen)
