"""The columns of a layer's input are what its weights are multiplied with, and H is their product."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.rounding.gram import MIRROR, Gram, Unfold, choose_positions, mirror
from mezzotint.runtime.arrays import Floats


def all_positions(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    return choose_positions(sizes, prod(sizes), np.random.default_rng(0))


def conv_model(x: Floats, weight: Floats, attributes: dict[str, Any]) -> ir.Model:
    value = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    kernel = ir.Value(name="w", shape=ir.Shape(weight.shape), type=ir.TensorType(ir.DataType.FLOAT))
    kernel.const_value = ir.tensor(weight, name="w")
    out = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * x.ndim))
    node = ir.node("Conv", [value, kernel], attributes, outputs=[out], name="conv")
    graph = ir.Graph([value], [out], nodes=[node], initializers=[kernel], opset_imports={"": 21}, name="one")
    return ir.Model(graph, ir_version=10)


def check_columns(unfold: Unfold, x: Floats, weight: Floats, want: Floats) -> None:
    """W @ columns, group by group, against a convolution's output `[N, C, ...]`."""
    columns = unfold.columns(x, all_positions(unfold.positions(x.shape)))
    rows = weight.reshape(unfold.groups, len(weight) // unfold.groups, -1)
    got = np.einsum("pgd,grd->pgr", columns, rows).reshape(len(columns), -1)
    np.testing.assert_allclose(got, np.moveaxis(want, 1, -1).reshape(got.shape), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_unfolding_is_what_onnxruntime_convolves(
    tmp_path_factory: pytest.TempPathFactory,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, ...],
    groups: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 4, 7, 6)).astype(np.float32)
    weight = rng.standard_normal((8, 4 // groups, *kernel)).astype(np.float32)
    attributes = {"strides": strides, "dilations": dilations, "pads": pads, "group": groups}
    model = conv_model(x, weight, attributes)
    unfold = Unfold.of(model.graph[0], weight.shape)
    with Executor(model, tmp_path_factory.mktemp("conv"), threads=1) as executor:
        want = executor.run({"x": x})["y"]
    check_columns(unfold, x, weight, want)
    with pytest.raises(AssertionError):
        check_columns(unfold, x, weight, np.asarray(want * 1.01 + 0.01, np.float32))
    if pads[0] != pads[2]:
        other = replace(unfold, pads=(pads[2], pads[1], pads[0], pads[3]))
        with pytest.raises(AssertionError):
            check_columns(other, x, weight, want)


def test_convolutions_of_other_ranks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 9)).astype(np.float32)
    weight = rng.standard_normal((4, 3, 3)).astype(np.float32)
    model = conv_model(x, weight, {"pads": [1, 0], "strides": [2]})
    with Executor(model, tmp_path, threads=1) as executor:
        check_columns(Unfold.of(model.graph[0], weight.shape), x, weight, executor.run({"x": x})["y"])


def test_linear_layers_read_their_last_dimension() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    unfold = Unfold()
    assert unfold.positions(x.shape) == (2, 3)
    np.testing.assert_array_equal(unfold.columns(x, all_positions((2, 3)))[:, 0], x.reshape(6, 4))
    flat = unfold.columns(x[:, 0], all_positions((2,)))
    np.testing.assert_array_equal(flat[:, 0], x[:, 0])


def test_padding_in_words_is_refused() -> None:
    model = conv_model(
        np.zeros((1, 1, 4, 4), np.float32), np.zeros((1, 1, 3, 3), np.float32), {"auto_pad": "SAME_UPPER"}
    )
    with pytest.raises(PassError, match="SAME_UPPER"):
        Unfold.of(model.graph[0], (1, 1, 3, 3))


@given(sizes=st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)), limit=st.integers(1, 60))
def test_positions_are_shared_by_samples(sizes: tuple[int, int, int], limit: int) -> None:
    first, inner = choose_positions(sizes, limit, np.random.default_rng(3))
    assert len(first) <= limit
    assert len({*zip(first.tolist(), inner.tolist(), strict=True)}) == len(first)
    assert inner.max() < prod(sizes[1:]) and first.max() < sizes[0]
    each = np.bincount(first, minlength=sizes[0])
    assert set(each[each > 0]) == {each.max()}
    assert (each > 0).sum() == min(sizes[0], limit)
    again = choose_positions(sizes, limit, np.random.default_rng(3))
    np.testing.assert_array_equal(again, (first, inner))


def check_gram(matrix: Floats, columns: Floats) -> None:
    want = np.einsum("pgi,pgj->gij", columns, columns, dtype=np.float64)
    np.testing.assert_allclose(matrix, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_sums_of_products(groups: int) -> None:
    columns = np.random.default_rng(0).standard_normal((40, groups, 7)).astype(np.float32)
    gram = Gram(groups, 7)
    gram.add(columns[:25])
    gram.add(columns[25:])
    check_gram(gram.matrix(), columns)
    np.testing.assert_array_equal(gram.matrix(), gram.matrix().transpose(0, 2, 1))
    with pytest.raises(AssertionError):
        check_gram(gram.matrix() * np.float32(1.01), columns)


def test_the_noise_is_what_rounding_to_one_grid_makes() -> None:
    rng = np.random.default_rng(1)
    gram, parts = Gram(1, 4), [(rng.uniform(-1, 3, (4000, 1, 4)), 0.5), (rng.uniform(-0.3, 0.2, (4000, 1, 4)), 4.0)]
    for x, factor in parts:
        gram.add((x * factor).astype(np.float32), factor)
    step = 4 / (2**4 - 1)
    squares = [factor**2 * (x - np.rint(x / step) * step) ** 2 for x, factor in parts]
    assert gram.extent.rounding_noise(4) == pytest.approx(np.concatenate(squares).sum(axis=(0, 1)).mean(), rel=0.1)


def test_large_matrices_are_mirrored_in_parts() -> None:
    size = MIRROR + 5
    whole = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    lower = np.tril(whole)
    mirror(lower)
    np.testing.assert_array_equal(np.tril(lower), np.tril(whole))
    np.testing.assert_array_equal(lower, lower.T)
