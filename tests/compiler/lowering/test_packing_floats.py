"""Float constants in half precision, and tables of integers in two bytes: nothing is lost, all of it is folded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mezzotint.compiler.bundle.writer import save_model
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.lowering import packable
from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.session import open_session
from tests.compiler.audit.test_versions import OLDEST, OLDEST_FOLDER, build_and_run
from tests.compiler.lowering.test_packing import packed, run, stored

CHANNELS = 32


def half_values(*shape: int) -> AnyArray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float16).astype(np.float32)


def island(weight: AnyArray) -> ir.Model:
    """A float convolution with a bias from a table of float rows, read by a map of integers."""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    island (float[1,{CHANNELS},8,8] x) => (float[1,{CHANNELS},8,8] y)
    <float[{CHANNELS},{CHANNELS},3,3] w, float[20,{CHANNELS}] rows, int64[1000] nearest, int64 column = {{1}}>
    {{ sizes = Shape (x) n = Gather <axis = 0> (sizes, column) row = Gather <axis = 0> (nearest, n)
    b = Gather <axis = 0> (rows, row) y = Conv <pads = [1, 1, 1, 1]> (x, w, b) }}""")
    nearest = np.arange(1000, dtype=np.int64) // 50
    fill(model, w=weight, rows=half_values(20, CHANNELS), nearest=nearest)
    return model


def table(rows: AnyArray) -> ir.Model:
    """A row of a table of integers, chosen by the input."""
    kind = "int64" if rows.dtype == np.int64 else "int32"
    shape = ",".join(map(str, rows.shape))
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    table (float[1] x) => ({kind}[1,{rows.shape[-1]}] y) <{kind}[{shape}] rows, float limit = {{0}}>
    {{ below = Min (x, limit) whole = Cast <to = 7> (below) y = Gather <axis = 0> (rows, whole) }}""")
    fill(model, rows=rows)
    return model


def fill(model: ir.Model, **arrays: AnyArray) -> None:
    named = {name_of(v): v for node in model.graph for v in node.inputs if v is not None}
    for name, array in arrays.items():
        named[name].const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(named[name])


def bias_rows(reach: int, dtype: Any = np.int32) -> AnyArray:
    """Rows around a middle of each column, as biases that depend on the timestep are, `[20, 64]`."""
    rng = np.random.default_rng(8)
    return (rng.integers(-(10**6), 10**6, 64) + rng.integers(-reach, reach, (20, 64))).astype(dtype)


def test_half_values_take_half_and_the_fast_kernel_stays(tmp_path: Path) -> None:
    plain = island(half_values(CHANNELS, CHANNELS, 3, 3))
    narrow = packed(plain)
    kept = stored(narrow)
    assert kept["FLOAT"] == 0
    assert kept["FLOAT16"] == 2 * (CHANNELS * CHANNELS * 9 + 20 * CHANNELS)
    assert kept["INT8"] == 1000
    (want, operations), (got, same) = run(plain, tmp_path, "plain"), run(narrow, tmp_path, "narrow")
    assert same == operations
    np.testing.assert_array_equal(got, want)


def test_a_constant_bias_leaves_the_blocked_convolution(tmp_path: Path) -> None:
    model = island(half_values(CHANNELS, CHANNELS, 3, 3))
    conv = next(node for node in model.graph if node.op_type == "Conv")
    conv.resize_inputs(2)
    _, operations = run(packed(model), tmp_path)
    built = onnx.load(tmp_path / "model-built.onnx")
    assert operations["Conv"] == 1
    assert next(node.domain for node in built.graph.node if node.op_type == "Conv") == "com.microsoft.nchwc"


def test_one_value_between_keeps_all_in_float() -> None:
    weight = half_values(CHANNELS, CHANNELS, 3, 3)
    weight[-1, -1, -1, -1] = 1.0001
    assert stored(packed(island(weight)))["FLOAT"] == weight.nbytes


@pytest.mark.parametrize("value", [70000.0, np.float32(2) ** -26])
def test_what_half_precision_does_not_reach_stays(value: float) -> None:
    weight = half_values(CHANNELS, CHANNELS, 3, 3)
    weight[0, 0, 0, 0] = value
    assert stored(packed(island(weight)))["FLOAT"] == weight.nbytes


def test_scales_and_small_constants_stay() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    layer (float[1,1024] x) => (float[1,1024] y) <float[1024] scales, uint8[1024] zeros, float[64] small>
    { q = QuantizeLinear <axis = 1> (x, scales, zeros)
    d = DequantizeLinear <axis = 1> (q, scales, zeros) y = Concat <axis = 1> (small, d) }""")
    fill(model, scales=np.full(1024, 0.5, np.float32), zeros=np.zeros(1024, np.uint8), small=np.ones(64, np.float32))
    assert stored(packed(model)) == stored(model)


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        (bias_rows(30000), {"INT16": 20 * 64 * 2, "INT32": 64 * 4}),
        (bias_rows(100), {"INT8": 20 * 64, "INT32": 64 * 4}),
        (bias_rows(30000) % 30000, {"INT16": 20 * 64 * 2}),
        (bias_rows(30000, np.int64) % 200, {"UINT8": 20 * 64}),
        (np.where(np.arange(64) == 7, bias_rows(10**8), bias_rows(9000)), {"INT16": 20 * 63 * 2, "INT32": 4 * 147}),
        (bias_rows(10**8), {"INT32": 20 * 64 * 4}),
        (bias_rows(10**12, np.int64), {"INT64": 20 * 64 * 8}),
    ],
    ids=["middle", "bytes", "small", "unsigned", "one-wide-column", "wide", "wider"],
)
def test_tables_of_integers_keep_their_values(rows: AnyArray, kinds: dict[str, int], tmp_path: Path) -> None:
    plain = table(rows)
    narrow = packed(plain)
    found = {kind: size for kind, size in stored(narrow).items() if kind != "FLOAT"}
    assert found == kinds
    save_model(narrow, tmp_path / "narrow.onnx")
    session = open_session(tmp_path / "narrow.onnx", threads=1)
    for row in range(1, len(rows)):
        (got,) = session.run(None, {"x": np.array([-row], np.float32)})
        np.testing.assert_array_equal(got[0], rows[-row])
    _, operations = run(narrow, tmp_path, "narrow")
    _, before = run(plain, tmp_path, "plain")
    assert operations == before


def test_another_row_would_be_seen(tmp_path: Path) -> None:
    """The twin: one entry of a packed table is one more."""
    rows = bias_rows(30000)
    want, _ = run(packed(table(rows)), tmp_path)
    got, _ = run(packed(table(rows + 1)), tmp_path)
    assert not np.array_equal(got, want)


def test_sizes_are_no_tables() -> None:
    """Shape inference reads them before anything is folded."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    parts (float[600] x) => (float[n] y) <int64[300] sizes> { y, z = Split <axis = 0> (x, sizes) }""")
    fill(model, sizes=np.full(300, 2))
    assert stored(packed(model)) == stored(model)


def test_notes_of_the_exporter_go() -> None:
    model = table(bias_rows(100))
    for node in model.graph:
        node.metadata_props["scope"] = "a.b.c"
    assert not any(node.metadata_props for node in packed(model).graph)
    assert all(node.metadata_props for node in model.graph)


def test_the_oldest_onnxruntime_folds_them_too(tmp_path: Path) -> None:
    made = {
        "island": island(half_values(CHANNELS, CHANNELS, 3, 3)),
        "table": table(np.where(np.arange(64) == 7, bias_rows(10**8), bias_rows(9000))),
    }
    models, wanted = {}, {}
    for name, plain in made.items():
        wanted[name] = run(plain, tmp_path, f"{name}-plain")
        models[name] = tmp_path / f"{name}.onnx"
        save_model(packed(plain), models[name])
        (x,) = plain.graph.inputs
        assert x.shape is not None
        given = np.random.default_rng(1).normal(size=x.shape.numpy()).astype(np.float32) * 2
        np.savez(models[name].with_suffix(".npz"), x=given)
    (tmp_path / "oldest").mkdir()
    assert build_and_run(models, tmp_path / "oldest", [OLDEST_FOLDER]) == OLDEST
    for name, (want, operations) in wanted.items():
        built = onnx.load(tmp_path / "oldest" / f"{name}.onnx", load_external_data=False)
        assert Counter(node.op_type for node in built.graph.node) == operations
        np.testing.assert_allclose(np.load(tmp_path / "oldest" / f"{name}.npy"), want, rtol=0, atol=1e-5)


def test_a_value_is_half_or_not() -> None:
    assert np.array_equal(packable.rounded_to_half(np.array([1.5, 65504], np.float32)), [1.5, 65504])
    assert np.isinf(packable.rounded_to_half(np.array([65520], np.float32))).all()
