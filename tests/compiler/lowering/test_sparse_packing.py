"""Constants with many zeros: the same numbers from the same kernels, in fewer bytes.

test_packing.py has them on the oldest onnxruntime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.lowering import packable, packing, sparse_packing
from mezzotint.compiler.lowering.sparse_packing import SparseForm
from mezzotint.runtime.arrays import AnyArray
from tests.compiler.lowering.test_packing import integers, kernel, layer, packed, run, stored, unpacked_by_onnxruntime

FLOAT = """<ir_version: 10, opset_import: ["" : 21]>
layer (float[2,{inputs}] x) => (float[2,{rows}] y) <float[{inputs},{rows}] w> {{ y = MatMul (x, w) }}"""


def sparse(form: str, bits: int, blocks: bool = False) -> AnyArray:
    """A weight of which two thirds are zero, one by one or in fours of its inputs."""
    q = integers(form, bits).astype(np.int8)
    axis = 0 if form.startswith("matmul") else 1
    q = np.take(np.concatenate([q, q], axis), np.arange(q.shape[axis] // 4 * 8), axis)
    rng = np.random.default_rng(2)
    if not blocks:
        return np.asarray(q * (rng.random(q.shape) < 1 / 3), np.int8)
    shape = list(q.shape)
    shape[axis] //= 4
    return np.asarray(q * np.repeat(rng.random(shape) < 1 / 3, 4, axis), np.int8)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    ("form", "bits"), [("conv", 8), ("conv_qdq", 4), ("matmul", 2), ("gemm_qdq", 8), ("matmul", 4)]
)
def test_the_same_numbers_from_the_same_kernel(form: str, bits: int, blocks: bool, tmp_path: Path) -> None:
    q = sparse(form, bits, blocks)
    plain = layer(form, q)
    small = packed(plain)
    share = 1 / 3 * bits / 8 + 1 / 8 / (4 if blocks else 1)
    taken = sum(stored(small).values()) - sum(stored(plain).values()) + q.nbytes
    assert taken < q.size * share * 1.06 + 256 * 8 * 4 + 256 * 4  # tables of ranks and of pairs of bits
    want, operations = run(plain, tmp_path, "plain")
    got, same = run(small, tmp_path, "small")
    assert operations[kernel(form)] == 1 and same == operations
    np.testing.assert_array_equal(got, want)
    q.reshape(-1)[: q.size // 4] = 0
    assert not np.array_equal(run(packed(layer(form, q)), tmp_path, "other")[0], want)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 70), seed=st.integers(0, 99), blocks=st.booleans())
def test_any_number_of_values(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, seed: int, blocks: bool
) -> None:
    rng = np.random.default_rng(seed)
    kept = np.repeat(rng.random((rows, columns)) < 0.3, 4, axis=1) if blocks else rng.random((rows, columns)) < 0.3
    q = (rng.integers(1, 127, kept.shape) * kept).astype(np.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_packing, "NODES", -400)
        small = packed(layer("gemm_qdq", q))
    assert any(name.endswith("_bits") for name in small.graph.initializers)
    np.testing.assert_array_equal(unpacked_by_onnxruntime(small, tmp_path_factory.mktemp("any")), q)


def floats(half: bool = False) -> ir.Model:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((64, 96)) * (rng.random((64, 96)) < 0.4)).astype(np.float32)
    w = packable.rounded_to_half(w) if half else w
    model = ir.from_onnx_text(FLOAT.format(inputs=64, rows=96))
    value = model.graph.initializers["w"] if "w" in model.graph.initializers else model.graph.node(0).inputs[1]
    assert value is not None
    value.const_value = ir.tensor(w, name="w")
    model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("half", [False, True])
def test_float_weights(half: bool, tmp_path: Path) -> None:
    plain = floats(half)
    small = plain.clone()
    packing.pack_floats(small)
    want, _ = run(plain, tmp_path, "plain")
    got, operations = run(small, tmp_path, "small")
    np.testing.assert_array_equal(got, want)
    assert set(operations) <= {"MatMul", "FusedMatMul"}
    assert stored(small)["FLOAT16" if half else "FLOAT"] < (2 if half else 4) * 64 * 96 * 0.45
    assert packable.has_sparse_floats(plain)


def test_dense_constants_have_no_sparse_form() -> None:
    rng = np.random.default_rng(0)
    q = rng.integers(-8, 8, (64, 64)).astype(np.int8)
    assert SparseForm.of(q, 4) is None and SparseForm.of(q * 0 + 1, 8) is None
    half = np.tile(q * (rng.random((64, 64)) < 0.5), (4, 4)).astype(np.int8)
    assert SparseForm.of(half, 2) is None  # a bit for each of them is as large
    assert SparseForm.of(half, 8) is not None
