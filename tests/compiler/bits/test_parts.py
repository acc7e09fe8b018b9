"""Widths by output channel: grids of rows, rounding inside them, and parts that add up to their weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.bits.allocation import RELATIVE_GAP, allocate
from mezzotint.compiler.bits.parts import Parts, cut, cuttable, joined_bytes, kurtosis, pieces_of, shares_of
from mezzotint.compiler.bits.units import BitChoice, Unit, joined, units_of
from mezzotint.compiler.core.formats import Format, Grid, Levels, RowFormats, quantize
from mezzotint.compiler.core.program import Program, Quantizer, Site
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rounding.exact import obq
from mezzotint.compiler.rounding.matrix import comq, gptq, input_order, inverse_root, nearest
from mezzotint.compiler.rounding.row_scales import search
from mezzotint.compiler.scales.weights import rounded_weight, weight_format, weight_quantizer
from mezzotint.runtime.arrays import Floats
from tests.helpers.tiny import program_of, tiny_program

WIDTHS = (2, 4, 8)
Bits = npt.NDArray[np.int8]
bits_of_rows = st.lists(st.sampled_from(range(2, 9)), min_size=1, max_size=6).map(lambda b: np.array(b, np.int8))


def one(bits: int) -> Format:
    return Format(bits, signed=True, symmetric=True)


@given(bits_of_rows)
def test_every_row_ends_where_its_own_format_does(bits: Bits) -> None:
    grid = RowFormats(bits)
    assert [(int(a), int(b)) for a, b in zip(grid.qmin, grid.qmax, strict=True)] == [
        (one(b).qmin, one(b).qmax) for b in bits.tolist()
    ]


@settings(deadline=None)
@given(bits_of_rows, st.integers(0, 2**32 - 1), st.sampled_from([0, 1]))
def test_rows_are_quantized_each_as_alone(bits: Bits, seed: int, axis: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(bits), 5)).astype(np.float32) * 3
    scale, zero = np.full(len(bits), 0.25, np.float32), np.zeros(len(bits), np.int8)
    got = quantize(x if axis == 0 else x.T.copy(), scale, zero, RowFormats(bits), axis)
    want = [quantize(row, scale[0], zero[0], one(b)) for row, b in zip(x, bits.tolist(), strict=True)]
    np.testing.assert_array_equal(got if axis == 0 else got.T, np.stack(want))


def problem(seed: int) -> tuple[Floats, npt.NDArray[np.float64], Floats]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((12, 12)) @ rng.standard_normal((12, 60)) + 0.5
    weight = rng.standard_normal((5, 12)).astype(np.float32)
    return weight, x @ x.T, (np.abs(weight).max(axis=1) / 3).astype(np.float32)


Method = Callable[[Floats, npt.NDArray[np.float64], Floats, Grid], Floats]


def by_gptq(weight: Floats, gram: npt.NDArray[np.float64], scale: Floats, grid: Grid) -> Floats:
    return gptq(weight, inverse_root(gram, input_order(gram, True), 0.01, "here"), scale, grid, block=4)


def by_obq(weight: Floats, gram: npt.NDArray[np.float64], scale: Floats, grid: Grid) -> Floats:
    return obq(weight, inverse_root(gram, input_order(gram, True), 0.01, "here"), scale, grid, exact=8)


def by_comq(weight: Floats, gram: npt.NDArray[np.float64], scale: Floats, grid: Grid) -> Floats:
    return comq(weight, gram, scale, grid, sweeps=4, block=4)


METHODS: dict[str, Method] = {
    "nearest": lambda weight, gram, scale, grid: nearest(weight, scale, grid),
    "search": lambda weight, gram, scale, grid: search(weight, scale, grid, np.diagonal(gram))[:, None],
    "gptq": by_gptq,
    "obq": by_obq,
    "comq": by_comq,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_one_width_are_rounded_as_by_that_format(method: str, seed: int) -> None:
    weight, gram, scale = problem(seed)
    made = METHODS[method]
    bits = np.full(5, 3, np.int8)
    np.testing.assert_array_equal(
        made(weight, gram, scale, RowFormats(bits)), made(weight, gram, scale, one(3)), err_msg=method
    )


@pytest.mark.parametrize("method", ["nearest", "search", "gptq", "obq"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_different_widths_are_rounded_each_as_alone(method: str, seed: int) -> None:
    weight, gram, scale = problem(seed)
    bits = np.array([2, 8, 3, 4, 2], np.int8)
    got = METHODS[method](weight, gram, scale, RowFormats(bits))
    for i, width in enumerate(bits.tolist()):
        np.testing.assert_array_equal(got[i], METHODS[method](weight, gram, scale, one(width))[i])
    assert not np.array_equal(got, METHODS[method](weight, gram, scale, one(8)))


@pytest.mark.parametrize("method", METHODS)
def test_a_codebook_of_the_formats_integers_rounds_as_the_format(method: str) -> None:
    """The twin: other levels give other integers, which are levels; rows are rounded each as alone."""
    weight, gram, scale = problem(1)
    made = METHODS[method]
    same = np.tile(np.arange(-3, 4, dtype=np.int8), (5, 1))
    want = made(weight, gram, scale, one(3))
    np.testing.assert_array_equal(made(weight, gram, scale, Levels(same)), want)
    np.testing.assert_array_equal(made(weight, gram, scale, Levels(same[0])), want)
    other = np.sort(np.random.default_rng(0).integers(-5, 6, (5, 6)), axis=1).astype(np.int8)
    got = made(weight, gram, scale, Levels(other))
    assert not np.array_equal(got, want)
    if method != "search":
        assert all(set(row) <= set(table) for row, table in zip(got.tolist(), other.tolist(), strict=True))
    if method != "comq":
        alone = [made(weight, gram, scale, Levels(table))[i] for i, table in enumerate(other)]
        np.testing.assert_array_equal(got, alone)


def test_comq_stays_inside_every_rows_grid() -> None:
    weight, gram, scale = problem(0)
    bits = np.array([2, 8, 3, 4, 2], np.int8)
    largest = np.abs(by_comq(weight, gram, scale, RowFormats(bits))).max(axis=1)
    assert (largest <= (1 << (bits - 1)) - 1).all()
    assert not (np.abs(by_comq(weight, gram, scale, one(8))).max(axis=1) <= (1 << (bits - 1)) - 1).all()


def test_what_a_quantizer_says() -> None:
    scale, zero = np.full(5, 0.5, np.float32), np.zeros(5, np.int8)
    plain = Quantizer(one(8), scale, zero, "test", axis=0)
    mixed = Quantizer(one(8), scale, zero, "test", axis=0, row_bits=np.array([2, 8, 4, 4, 8], np.int8))
    assert plain.grid == one(8) and not plain.widths
    site = Site("w")
    assert "row_bits" not in plain.entry(site).to_json()
    assert mixed.entry(site) == replace(plain.entry(site), row_bits={"2": 1, "4": 2, "8": 2})
    weight = np.full((5, 2), 9.9, np.float32)
    np.testing.assert_array_equal(rounded_weight(weight, mixed)[:, 0], [0.5, 10.0, 3.5, 3.5, 10.0])


@pytest.fixture(scope="module")
def conv() -> Unit:
    return next(unit for unit in units_of(list(layers(tiny_program().graph))) if unit.name == "b1_conv1")


def round_at(unit: Unit, bits: int) -> Floats:
    assert unit.weight is not None
    return rounded_weight(numpy_of(unit.weight), weight_quantizer(unit.layers[0], weight_format(bits), "mse", "test"))


def cut_conv(unit: Unit, errors: list[float], parts: int, order: str = "error") -> Parts:
    choices = [[BitChoice(bits) for bits in WIDTHS]]
    costs = [[unit.size * bits for bits in WIDTHS]]
    return cut([unit], choices, [errors], costs, round_at, parts=parts, order=order)  # type: ignore[arg-type]


def check_sums(made: Parts, unit: Unit, errors: list[float]) -> None:
    np.testing.assert_allclose(np.sum(made.errors, axis=0), errors, rtol=1e-9, atol=0)
    assert np.sum(made.costs, axis=0).tolist() == [unit.size * bits for bits in WIDTHS]
    rows = np.concatenate([part.rows for part in made.units if part.rows is not None])
    assert sorted(rows.tolist()) == list(range(unit.channels))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(1e-12, 1e3), min_size=3, max_size=3),
    st.integers(2, 40),
    st.sampled_from(["error", "kurtosis"]),
)
def test_parts_add_up_to_their_weight(conv: Unit, errors: list[float], parts: int, order: str) -> None:
    made = cut_conv(conv, errors, parts, order)
    assert len(made.units) == min(parts, conv.channels)
    assert sum(part.size for part in made.units) == conv.size
    check_sums(made, conv, errors)
    made.errors[0][1] *= 1.01
    made.errors[0][1] += 0.01 * errors[1]
    with pytest.raises(AssertionError):
        check_sums(made, conv, errors)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(1, 12))
def test_pieces_are_sorted_of_nearly_equal_size_and_share_everything(values: list[float], parts: int) -> None:
    array = np.array(values)
    pieces = pieces_of(array, parts)
    sizes = [len(piece) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1 and len(pieces) == min(parts, len(values))
    assert all(array[a].max() <= array[b].min() for a, b in pairwise(pieces))
    assert shares_of(array, pieces).sum() == pytest.approx(1, rel=1e-9)


def test_one_part_is_the_unit_itself(conv: Unit) -> None:
    made = cut_conv(conv, [3.0, 2.0, 1.0], 1)
    assert made.units == [conv] and made.errors == [[3.0, 2.0, 1.0]]


def test_the_worst_channels_come_last_in_either_order(conv: Unit) -> None:
    assert conv.weight is not None
    plain = numpy_of(conv.weight).reshape(16, -1)
    loud, outlying = plain.copy(), plain.copy()
    loud[5] *= 50  # as Gaussian as before, and its error 2500 times as large
    outlying[7, 3] = 40 * plain[7].std()
    assert int(np.argmax(kurtosis(outlying))) == 7 and int(np.argmax(kurtosis(loud))) == int(np.argmax(kurtosis(plain)))
    np.testing.assert_allclose(kurtosis(loud), kurtosis(plain), rtol=1e-4)
    centred = plain[2].astype(np.float64) - plain[2].astype(np.float64).mean()
    assert kurtosis(plain)[2] == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2, rel=1e-6)
    assert kurtosis(np.ones((1, 4), np.float32)).tolist() == [0]
    parts = cut_conv(conv, [1.0, 1.0, 1.0], 4)
    first = [row[0] for row in parts.errors]
    assert first == sorted(first) and first[0] < 0.9 * first[-1]


def test_joined_parts_are_whole_units(conv: Unit) -> None:
    parts = cut_conv(conv, [1.0, 1.0, 1.0], 4).units
    ((unit, choice, bits),) = joined(parts, [BitChoice(4)] * 4)
    assert unit.size == conv.size and unit.rows is None and choice == BitChoice(4) and bits is None
    ((_, choice, bits),) = joined(parts, [BitChoice(4), BitChoice(2), BitChoice(8), BitChoice(4)])
    assert choice == BitChoice(8) and bits is not None
    assert parts[1].rows is not None and parts[2].rows is not None
    assert np.flatnonzero(bits == 2).tolist() == parts[1].rows.tolist()
    assert np.flatnonzero(bits == 8).tolist() == parts[2].rows.tolist()


def two_axes() -> Program:
    """One weight whose rows are the channels of one layer, and whose columns are those of the other."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    two (float[batch,4] sample, int64[batch] timestep) => (float[batch,4] epsilon) <float[4,4] w>
    { a = Gemm <transB = 1> (sample, w) epsilon = Gemm (a, w) }""")
    value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == "w")
    value.const_value = ir.tensor(np.eye(4, dtype=np.float32), name="w")
    model.graph.register_initializer(value)
    return program_of(model)


def test_a_weight_with_two_kinds_of_channels_is_not_cut() -> None:
    (unit,) = units_of(list(layers(two_axes().graph)))
    assert len(unit.layers) == 2 and not cuttable(unit) and joined_bytes([unit]) == 0
    assert cut_conv(unit, [1.0, 1.0, 1.0], 4).units == [unit]


def test_a_thousand_parts_are_solved_in_no_time() -> None:
    """As of a network of a hundred layers: the errors span six powers of ten."""
    rng = np.random.default_rng(0)
    size = rng.choice([320, 640, 1280], 1000).astype(int) * 288
    error = np.repeat(10 ** rng.uniform(-8, -2, 100), 10) * rng.lognormal(0, 0.7, 1000)
    errors = [[25 * e, e, e / 256] for e in error.tolist()]
    costs = [[int(n) * bits for bits in WIDTHS] for n in size]
    found = allocate(errors, costs, int(4.2 * size.sum()), time_limit=5.0)
    assert found is not None and found.gap <= RELATIVE_GAP
