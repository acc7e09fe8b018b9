"""Weights of 4 bits with two of every four inputs left: the same numbers from the same kernels, in 3 bits a value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.bundle.storage import _kind
from mezzotint.compiler.lowering import packing, pair_packing
from mezzotint.compiler.lowering.pair_packing import PairForm
from mezzotint.runtime.arrays import AnyArray
from tests.compiler.lowering.test_packing import integers, kernel, layer, packed, run, stored, unpacked_by_onnxruntime
from tests.compiler.lowering.test_sparse_packing import sparse


@pytest.fixture(autouse=True)
def every_weight_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_packing, "LARGE", 1)


def two_of_four(form: str, bits: int = 4) -> AnyArray:
    """A weight in which two of every four inputs are 0, and some fours have one value or none."""
    q = integers(form, bits).astype(np.int8)
    axis = 0 if form.startswith("matmul") else 1
    q = np.take(np.concatenate([q, q], axis), np.arange(q.shape[axis] // 4 * 8), axis)
    fours = np.moveaxis(q, axis, -1).reshape(-1, 4)
    rng = np.random.default_rng(3)
    gone = np.argsort(rng.random(fours.shape), axis=1) < rng.choice([2, 2, 2, 3, 4], len(fours))[:, None]
    fours = np.where(gone, 0, fours)
    moved = np.moveaxis(q, axis, -1).shape
    return np.ascontiguousarray(np.moveaxis(fours.reshape(moved), -1, axis))


def kinds(model: ir.Model) -> dict[str, int]:
    """The number of values by storage type."""
    found: dict[str, int] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.name is not None and value.name.endswith(("_pairs", "_both")):
            kind, count = _kind(value, value.const_value)
            found[kind] = found.get(kind, 0) + count
    return found


@pytest.mark.parametrize("form", ["conv", "conv_qdq", "matmul", "gemm_qdq"])
def test_the_same_numbers_from_the_same_kernel(form: str, tmp_path: Path) -> None:
    q = two_of_four(form)
    plain = layer(form, q)
    small = packed(plain)
    taken = sum(stored(small).values()) - sum(stored(plain).values()) + q.nbytes
    assert 0 <= taken - q.size * 3 / 8 <= 256 * 2 * 4 + 6 * 256 * 4 + 64, "beside the two tables"
    assert kinds(small) == {"mask": q.size, "int4": q.size // 2}
    want, operations = run(plain, tmp_path, "plain")
    got, same = run(small, tmp_path, "small")
    assert operations[kernel(form)] == 1 and same == operations
    np.testing.assert_array_equal(got, want)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 20), fours=st.integers(1, 12), seed=st.integers(0, 99), last=st.booleans())
def test_any_values_of_any_pairs(
    tmp_path_factory: pytest.TempPathFactory, rows: int, fours: int, seed: int, last: bool
) -> None:
    rng = np.random.default_rng(seed)
    q = rng.integers(-8, 8, (2 * rows, fours, 4)).astype(np.int8)
    q[np.argsort(rng.random(q.shape), axis=2) < rng.integers(2, 5, q.shape[:2])[..., None]] = 0
    q = q.reshape(2 * rows, 4 * fours)
    q = q if last else np.ascontiguousarray(q.T)
    assert PairForm.of(q) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SMALLEST_SAVING", 0)
        patch.setattr(packing, "CODES_COST", 1 << 30)
        small = packed(layer("gemm_qdq", q))
    if any(name.endswith("_int2") for name in small.graph.initializers):
        return  # rows of 2 bits lie apart
    assert any(name.endswith("_pairs") for name in small.graph.initializers)
    np.testing.assert_array_equal(unpacked_by_onnxruntime(small, tmp_path_factory.mktemp("pairs")), q)


def test_what_has_no_pairs() -> None:
    q = two_of_four("conv")
    assert PairForm.of(q) is not None
    full = q.copy()
    full[0, :4, 0, 0] = 1
    assert PairForm.of(full) is None, "four of four"
    wide = q.copy()
    wide[q != 0] = 8
    assert PairForm.of(wide) is None, "more than 4 bits"
    assert PairForm.of(q[:, :3]) is None, "no fours"
    assert PairForm.of(np.zeros((1, 4), np.int8)) is None, "one four, which shares a byte with none"


def test_few_values_stay_in_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of pairs would be a part of a small file."""
    monkeypatch.setattr(pair_packing, "LARGE", 1 << 20)
    names = packed(layer("conv", two_of_four("conv"))).graph.initializers
    assert not any(name.endswith("_pairs") for name in names)


def test_zeros_of_most_constants_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session would take 25 bytes for each value: above a limit zeros are stored."""
    q = sparse("conv", 8)
    assert any(name.endswith("_bits") for name in packed(layer("conv", q)).graph.initializers)
    monkeypatch.setattr(packing, "MOST_SPARSE", q.size - 1)
    assert not any(name.endswith("_bits") for name in packed(layer("conv", q)).graph.initializers)
