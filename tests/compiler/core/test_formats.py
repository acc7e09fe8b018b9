"""Formats and their arithmetic: properties that every range, shape and channel must have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import INT8, UINT8, Format, along, dequantize, quantize, scale_for_range
from mezzotint.compiler.core.pipeline import Context
from mezzotint.runtime.arrays import Floats, Integers
from tests.helpers.tiny import SIGNATURE

FORMATS = [UINT8, INT8, Format(4), Format(4, signed=True, symmetric=True), Format(8, signed=True)]
numbers = st.floats(-1e4, 1e4, width=32)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[float, float]:
    low, high = sorted((draw(numbers), draw(numbers)))
    return low, max(high, low + 1e-3)


def check_round_trip(x: Floats, got: Floats, scale: float) -> None:
    """Half a step, and what float32 loses in the division and the product."""
    np.testing.assert_allclose(got, x, rtol=1e-6, atol=scale * 0.5001)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@given(limits=ranges(), seed=st.integers(0, 1000))
def test_inside_the_range_the_error_is_half_a_step(fmt: Format, limits: tuple[float, float], seed: int) -> None:
    low, high = limits
    scale, zero = scale_for_range(low, high, fmt)
    # The zero point is rounded, too: the grid's own ends are what can be represented.
    x = np.random.default_rng(seed).uniform(low, high, 50).astype(np.float32)
    x = np.clip(x, (fmt.qmin - int(zero)) * scale, (fmt.qmax - int(zero)) * scale).astype(np.float32)
    q = quantize(x, scale, zero, fmt)
    assert q.dtype == fmt.dtype
    assert q.min() >= fmt.qmin and q.max() <= fmt.qmax
    check_round_trip(x, dequantize(q, scale, zero), float(scale))


def test_a_scale_that_is_one_percent_off_is_seen() -> None:
    scale, zero = scale_for_range(-1.0, 1.0, INT8)
    x = np.linspace(-1, 1, 50, dtype=np.float32)
    q = quantize(x, scale, zero, INT8)
    with pytest.raises(AssertionError):
        check_round_trip(x, dequantize(q, (scale * 1.01).astype(np.float32), zero), float(scale))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@given(limits=ranges())
def test_zero_is_exact_and_the_range_is_covered(fmt: Format, limits: tuple[float, float]) -> None:
    scale, zero = scale_for_range(*limits, fmt)
    nothing = np.zeros(1, np.float32)
    assert dequantize(quantize(nothing, scale, zero, fmt), scale, zero).tolist() == [0.0]
    ends = np.array([min(limits[0], 0), max(limits[1], 0)], np.float32)
    error = np.abs(dequantize(quantize(ends, scale, zero, fmt), scale, zero) - ends)
    assert np.all(error <= float(scale) * 1.001)


@given(st.lists(numbers, min_size=1, max_size=20))
def test_int8_is_symmetric(values: list[float]) -> None:
    x = np.array(values, np.float32)
    scale, zero = scale_for_range(x.min(), x.max(), INT8)
    assert zero == 0
    np.testing.assert_array_equal(quantize(-x, scale, zero, INT8), -quantize(x, scale, zero, INT8))


def test_formats() -> None:
    assert [(f.name, f.qmin, f.qmax) for f in FORMATS] == [
        ("uint8", 0, 255),
        ("int8", -127, 127),
        ("uint4", 0, 15),
        ("int4", -7, 7),
        ("int8", -128, 127),
    ]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel_is_per_tensor_for_each_channel(axis: int) -> None:
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((3, 4, 5)) * rng.uniform(0.1, 10, (3, 4, 1))).astype(np.float32)
    channels = np.moveaxis(x, axis, 0)
    limit = np.abs(channels).reshape(len(channels), -1).max(axis=1)
    scale, zero = scale_for_range(-limit, limit, INT8)
    assert scale.shape == zero.shape == limit.shape
    q = quantize(x, scale, zero, INT8, axis)
    back = np.moveaxis(dequantize(q, scale, zero, axis), axis, 0)
    for i, channel in enumerate(channels):
        np.testing.assert_array_equal(np.moveaxis(q, axis, 0)[i], quantize(channel, scale[i], zero[i], INT8))
        check_round_trip(channel, back[i], float(scale[i]))


def test_values_along_an_axis() -> None:
    assert along(np.arange(3), 1, 4).shape == (1, 3, 1, 1)
    assert along(np.arange(3), -1, 2).shape == (1, 3)
    assert along(np.array(1.0), None, 3).shape == ()


def test_an_empty_range_gives_a_scale_that_can_be_divided_by() -> None:
    for fmt in FORMATS:
        scale, zero = scale_for_range(0.0, 0.0, fmt)
        assert scale > 0
        assert dequantize(quantize(np.zeros(3, np.float32), scale, zero, fmt), scale, zero).tolist() == [0, 0, 0]


def onnxruntime_quantizes(x: Floats, scale: Floats, zero: Integers, context: Context) -> npt.NDArray[np.generic]:
    kind, low = ("uint8", "uint8[batch,2,8,8]") if zero.dtype == np.uint8 else ("int8", "int8[batch,2,8,8]")
    channels = "" if scale.ndim == 0 else f"[{scale.size}]"
    scales, zeros = (", ".join(repr(v) for v in a.reshape(-1).tolist()) for a in (scale, zero))
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,2,8,8] sample, int64[batch] timestep) => ({low} q)
    <float{channels} scale = {{{scales}}}, {kind}{channels} zero = {{{zeros}}}>
    {{ q = QuantizeLinear <axis = 1> (sample, scale, zero) }}""")
    with Executor(model, context.folder, threads=2) as executor:
        return executor.call(SIGNATURE, x, 0)["q"]


def test_the_arithmetic_is_onnxruntimes(context: Context) -> None:
    x = np.random.default_rng(0).normal(scale=3, size=(2, 2, 8, 8)).astype(np.float32)
    scale, zero = scale_for_range(-4.0, 5.0, UINT8)
    np.testing.assert_array_equal(onnxruntime_quantizes(x, scale, zero, context), quantize(x, scale, zero, UINT8))
    limit = np.array([8.0, 16.0])
    scale, zero = scale_for_range(-limit, limit, INT8)
    want = quantize(x, scale, zero, INT8, axis=1)
    np.testing.assert_array_equal(onnxruntime_quantizes(x, scale, zero, context), want)
    with pytest.raises(AssertionError):
        off = (scale * np.float32(1.01)).astype(np.float32)
        np.testing.assert_array_equal(onnxruntime_quantizes(x, off, zero, context), want)
