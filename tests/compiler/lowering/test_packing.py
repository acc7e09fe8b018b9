"""Constants stored in fewer bytes: the same numbers from the same kernels, on both onnxruntimes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.bundle import writer
from mezzotint.compiler.bundle.writer import save_model
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.lowering import packing, pair_packing
from mezzotint.compiler.lowering.codes import code_facts, coded
from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.session import open_session
from tests.compiler.audit.test_versions import OLDEST, OLDEST_FOLDER, build_and_run

ROWS, CHANNELS, INPUTS = 40, 11, 97

CONV = """q = QuantizeLinear (x, xs, xz) y8 = QLinearConv <pads = [1, 1, 1, 1]> (q, xs, xz, w, ws, wz, ys, xz)
    y = DequantizeLinear (y8, ys, xz)"""
CONV_QDQ = """q = QuantizeLinear (x, xs, xz) d = DequantizeLinear (q, xs, xz)
    wd = DequantizeLinear <axis = 0> (w, ws, wz) c = Conv <pads = [1, 1, 1, 1]> (d, wd)
    y8 = QuantizeLinear (c, ys, xz) y = DequantizeLinear (y8, ys, xz)"""
MATMUL = "q = QuantizeLinear (x, xs, xz) y = com.microsoft.MatMulIntegerToFloat (q, w, xs, ws, xz, wz)"
MATMUL_QDQ = """q = QuantizeLinear (x, xs, xz) d = DequantizeLinear (q, xs, xz)
    wd = DequantizeLinear <axis = 1> (w, ws, wz) y = MatMul (d, wd)"""
GEMM_QDQ = """q = QuantizeLinear (x, xs, xz) d = DequantizeLinear (q, xs, xz)
    wd = DequantizeLinear <axis = 0> (w, ws, wz) y = Gemm <transB = 1> (d, wd)"""
UNPACKING = {"Cast", "Gather", "GatherElements", "ReduceSum", "Concat", "CumSum", "ReduceMax", "Min", "Mul"}
FORMS = {"conv": CONV, "conv_qdq": CONV_QDQ, "matmul": MATMUL, "matmul_qdq": MATMUL_QDQ, "gemm_qdq": GEMM_QDQ}
KERNELS = {"conv": "QLinearConv", "matmul": "MatMulIntegerToFloat", "gemm": "QGemm"}


def kernel(form: str) -> str:
    return KERNELS[form.partition("_")[0]]


def integers(form: str, bits: int, wide_rows: int = 0) -> AnyArray:
    """A weight of a form in integers of `bits` bits, its first and some other output channels in 8."""
    rng = np.random.default_rng(5)
    shape = (ROWS, CHANNELS, 3, 3) if form.startswith("conv") else (ROWS, INPUTS)
    limit = 1 << (bits - 1)
    q = rng.integers(-limit, limit, shape)
    wide = rng.permutation(ROWS)[:wide_rows]
    q[wide] = rng.integers(-128, 128, (wide_rows, *shape[1:]))
    q = q.astype(np.int8)
    return q.T.copy() if form.startswith("matmul") else q


def layer(form: str, q: AnyArray, opset: int = 21) -> ir.Model:
    rows, inputs = (q.shape[1], q.shape[0]) if form.startswith("matmul") else q.shape[:2]
    image = ",4,4" if form.startswith("conv") else ""
    dims = ",".join(map(str, q.shape))
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    layer (float[2,{inputs}{image}] x) => (float[2,{rows}{image}] y)
    <float xs = {{0.05}}, uint8 xz = {{128}}, float ys = {{0.5}}, int8[{dims}] w, float[{rows}] ws, int8[{rows}] wz>
    {{ {FORMS[form]} }}""")
    constants = {"w": q, "ws": np.linspace(0.01, 0.02, rows, dtype=np.float32), "wz": np.zeros(rows, np.int8)}
    named = {name_of(v): v for node in model.graph for v in node.inputs if v is not None}
    for name, array in constants.items():
        named[name].const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(named[name])
    return model


def packed(model: ir.Model) -> ir.Model:
    clone = model.clone()
    packing.pack(clone)
    return clone


def run(model: ir.Model, folder: Path, stem: str = "model") -> tuple[AnyArray, Counter[str]]:
    """Return the outputs of a session, and the operations of the graph that it built."""
    file, built = folder / f"{stem}.onnx", folder / f"{stem}-built.onnx"
    save_model(model, file)
    session = open_session(file, threads=1, optimized=built)
    (given,) = session.get_inputs()
    x = np.random.default_rng(1).normal(size=given.shape).astype(np.float32) * 2
    y = np.asarray(session.run(None, {given.name: x})[0])
    return y, Counter(node.op_type for node in onnx.load(built, load_external_data=False).graph.node)


def stored(model: ir.Model) -> Counter[str]:
    """Return the bytes of the constants by type."""
    found: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        found[value.const_value.dtype.name] += value.const_value.nbytes
    return found


@pytest.mark.parametrize(("bits", "wide_rows"), [(4, 0), (2, 0), (4, 5), (2, 5), (3, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_numbers_from_the_same_kernel(form: str, bits: int, wide_rows: int, tmp_path: Path) -> None:
    plain = layer(form, integers(form, bits, wide_rows))
    narrow = packed(plain)
    assert stored(narrow)["INT4" if bits > 2 else "UINT8"] > 1
    want, operations = run(plain, tmp_path, "plain")
    got, same = run(narrow, tmp_path, "narrow")
    assert operations[kernel(form)] == 1
    assert same == operations
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_another_weight_gives_other_numbers(form: str, tmp_path: Path) -> None:
    """The twin: one integer of the narrow weight moves by one."""
    q = integers(form, 4, 5)
    want, _ = run(layer(form, q), tmp_path, "plain")
    q[-1, -1] ^= 1
    got, _ = run(packed(layer(form, q)), tmp_path, "narrow")
    assert not np.array_equal(got, want)


def test_bytes_per_weight() -> None:
    size = integers("conv", 4).size
    bare = stored(layer("conv", integers("conv", 4)))
    assert stored(packed(layer("conv", integers("conv", 4)))) == bare - Counter(INT8=size) + Counter(INT4=size // 2)
    two = stored(packed(layer("conv", integers("conv", 2))))
    assert two["UINT8"] - bare["UINT8"] == size // 4
    mixed = stored(packed(layer("conv", integers("conv", 4, wide_rows=6))))
    assert mixed["INT4"] == size * 34 // 40 // 2
    assert mixed["INT8"] == bare["INT8"] - size * 34 // 40
    assert mixed["INT32"] == 4 * ROWS


def test_eight_bits_and_few_bytes_stay() -> None:
    eight = layer("conv", integers("conv", 8))
    assert stored(packed(eight)) == stored(eight)
    four = layer("conv", integers("conv", 4)[:, :2])
    assert stored(packed(four)) == stored(four)  # 360 bytes would be saved


def test_a_few_narrow_rows_stay() -> None:
    q = integers("conv", 8)
    q[3] = 0
    assert stored(packed(layer("conv", q)))["INT4"] == 0


@pytest.mark.parametrize("bits", [2, 4])
def test_opsets_without_int4_look_bytes_up(bits: int, tmp_path: Path) -> None:
    plain = layer("conv", integers("conv", bits), opset=13)
    narrow = packed(plain)
    assert stored(narrow)["INT4"] == 0
    assert stored(narrow)["UINT8"] > integers("conv", bits).size * bits // 8
    (want, operations), (got, same) = run(plain, tmp_path, "plain"), run(narrow, tmp_path, "narrow")
    assert same == operations
    np.testing.assert_array_equal(got, want)


def test_int4_needs_a_newer_ir_version() -> None:
    assert packed(layer("conv", integers("conv", 4))).ir_version == packing.INT4_IR
    assert packed(layer("conv", integers("conv", 2))).ir_version == 8


def unpacked_by_onnxruntime(model: ir.Model, folder: Path) -> AnyArray:
    """Return a model's `w` as onnxruntime computes it from the stored constants."""
    clone = model.clone()
    weight = next(v for node in clone.graph for v in node.outputs if v.name == "w")
    clone.graph.outputs.append(weight)
    save_model(clone, folder / "w.onnx")
    session = open_session(folder / "w.onnx", threads=1)
    (given,) = session.get_inputs()
    return np.asarray(session.run(["w"], {"x": np.zeros(given.shape, np.float32)})[0])


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([2, 4]),
    opset=st.sampled_from([13, 21]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_any_number_of_integers(
    tmp_path_factory: pytest.TempPathFactory, bits: int, opset: int, rows: int, columns: int, seed: int
) -> None:
    """Odd numbers too: nothing is lost, and the last byte is filled up."""
    q = np.random.default_rng(seed).integers(-(1 << (bits - 1)), 1 << (bits - 1), (rows, columns)).astype(np.int8)
    q[0, 0] = -(1 << (bits - 1))  # so that 4 bits are needed where 4 are meant
    model = layer("gemm_qdq", q, opset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SMALLEST_SAVING", 0)
        narrow = packed(model)
    stores = [v.const_value for n, v in narrow.graph.initializers.items() if n.startswith("w_int")]
    assert 1 <= sum(kept.nbytes for kept in stores if kept is not None) <= -(-q.size * bits // 8)
    np.testing.assert_array_equal(unpacked_by_onnxruntime(narrow, tmp_path_factory.mktemp("odd")), q)


def test_the_oldest_onnxruntime_builds_the_same_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 4 bits, in 2, by rows, by code, sparse, 2:4: the kernel runs, no unpacking node is left, the numbers agree."""
    monkeypatch.setattr(pair_packing, "LARGE", 1)
    models, wanted = {}, {}
    for form in FORMS:
        sparse = integers(form, 8)
        sparse[np.random.default_rng(1).random(sparse.shape) < 0.7] = 0
        axis = 0 if form.startswith("matmul") else 1
        pairs = np.concatenate([integers(form, 4)] * 4, axis)
        np.moveaxis(pairs, axis, 0)[::2] = 0
        weights = {
            "4": integers(form, 4),
            "2": integers(form, 2, 5),
            "codes": by_code(form, 15 if form.endswith("qdq") else 8, own=form[0] != "c"),
            "sparse": sparse,
            "pairs": pairs,
        }
        for case, q in weights.items():
            name = f"{form}-{case}"
            plain = layer(form, q)
            wanted[name] = run(plain, tmp_path, f"{name}-plain")
            models[name] = tmp_path / f"{name}.onnx"
            small = packed(plain)
            assert any(value.endswith("_pairs") for value in small.graph.initializers) == (case == "pairs")
            save_model(small, models[name])
            (x,) = plain.graph.inputs
            shape = x.shape.numpy() if x.shape is not None else ()
            np.savez(models[name].with_suffix(".npz"), x=np.random.default_rng(1).normal(size=shape).astype("f4") * 2)
    (tmp_path / "oldest").mkdir()
    assert build_and_run(models, tmp_path / "oldest", [OLDEST_FOLDER]) == OLDEST
    for name, (want, operations) in wanted.items():
        built = onnx.load(tmp_path / "oldest" / f"{name}.onnx", load_external_data=False)
        found = Counter(node.op_type for node in built.graph.node)
        assert found[kernel(name.partition("-")[0])] == 1
        assert not {
            "Cast",
            "Gather",
            "GatherElements",
            "ReduceSum",
            "Concat",
            "CumSum",
            "ReduceMax",
            "Min",
            "Mul",
        } & set(found)
        assert sum(found.values()) == sum(operations.values())
        np.testing.assert_allclose(np.load(tmp_path / "oldest" / f"{name}.npy"), want, rtol=0, atol=1e-4 * np.ptp(want))


@pytest.mark.parametrize("external", [False, True])
def test_files_hold_half_and_can_be_read_again(external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if external:
        monkeypatch.setattr(writer, "EXTERNAL_BYTES", 0)
        monkeypatch.setattr(store, "SIZES_BYTES", 1024)
    plain = layer("conv", integers("conv", 4, 5))
    narrow = packed(plain)
    want, _ = run(narrow, tmp_path, "narrow")
    again = ir.load(tmp_path / "narrow.onnx")
    assert stored(again) == stored(narrow)
    assert isinstance(again.graph.initializers["w_int4"].const_value, ir.ExternalTensor) == external
    got, _ = run(again, tmp_path / "again")
    np.testing.assert_array_equal(got, want)
    run(plain, tmp_path, "plain")
    size, before = (sum(f.stat().st_size for f in tmp_path.glob(f"{n}.onnx*")) for n in ("narrow", "plain"))
    assert size < before - 35 * CHANNELS * 9 // 2 + 600  # what unpacks the 35 narrow rows costs less than 600 bytes


def test_a_weight_that_a_session_must_see_as_it_is_stays() -> None:
    """The graph's output, and a weight that two layers read with different axes."""
    model = layer("conv", integers("conv", 4))
    weight = model.graph.initializers["w"]
    model.graph.outputs.append(weight)
    assert "w" in packed(model).graph.initializers


def by_code(form: str, levels: int, own: bool) -> AnyArray:
    """A weight of a form with so many integers, the same ones or others (`own`) for each output channel."""
    rng = np.random.default_rng(levels)
    shape = (ROWS, 19, 3, 3) if form.startswith("conv") else (ROWS, 4 * INPUTS + 1)
    tables = [np.sort(rng.choice(np.arange(-127, 128), levels, replace=False)) for _ in range(ROWS)]
    rows = [rng.choice(tables[row if own else 0], shape[1:]) for row in range(ROWS)]
    q = np.stack(rows).astype(np.int8)
    return q.T.copy() if form.startswith("matmul") else q


@pytest.mark.parametrize(
    ("form", "levels", "own"), [(f, n, o) for f in FORMS for n, o in ((2, False), (8, True), (15, False))]
)
def test_a_codebook_gives_the_same_numbers_from_the_same_kernel(
    form: str, levels: int, own: bool, tmp_path: Path
) -> None:
    plain = layer(form, by_code(form, levels, own))
    narrow = packed(plain)
    bits = (levels - 1).bit_length()
    size = plain.graph.initializers["w"].const_value.size  # type: ignore[union-attr]
    codes = narrow.graph.initializers["w_codes"].const_value
    assert codes is not None and codes.nbytes == -(-size * bits // 8) + (0 if bits == 4 else -size % 8 * bits // 8)
    table = narrow.graph.initializers["w_levels"].const_value
    assert table is not None and table.size == levels * (ROWS if own else 1)
    want, operations = run(plain, tmp_path, "plain")
    got, same = run(narrow, tmp_path, "narrow")
    assert operations[kernel(form)] == 1 and same == operations
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("form", ["matmul", "matmul_qdq", "gemm_qdq"])
@pytest.mark.parametrize("size", [1, 2])
def test_codes_of_a_square_weight_are_those_of_its_output_channels(form: str, size: int, tmp_path: Path) -> None:
    """Nothing in the shape of a square weight says that its codes are turned."""
    rng, side = np.random.default_rng(size), 128
    if size == 1:
        tables = [rng.choice(np.arange(-127, 128), 4, replace=False) for _ in range(side)]
        q = np.stack([rng.choice(table, side) for table in tables])
    else:
        vectors = rng.integers(-127, 128, (64, size))
        q = vectors[rng.integers(0, 64, (side, side // size))].reshape(side, side)
    q = q.astype(np.int8)
    plain = layer(form, q.T.copy() if form.startswith("matmul") else q)
    narrow = packed(plain)
    assert "w_codes" in narrow.graph.initializers
    want, _ = run(plain, tmp_path, "plain")
    got, _ = run(narrow, tmp_path, "narrow")
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("opset", [17, 21])
def test_codes_above_a_limit_are_whole(opset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit a session would take four bytes for each bit."""
    monkeypatch.setattr(packing, "CODES_COST", -(1 << 20))
    q = by_code("gemm_qdq", 8, own=True)
    plain = layer("gemm_qdq", q, opset)
    small = packed(plain)
    assert code_facts(small.graph.initializers["w_codes"]) == (3, q.size)
    monkeypatch.setattr(packing, "MOST_BITWISE", q.size - 1)
    whole = packed(plain)
    assert code_facts(whole.graph.initializers["w_codes"]) == (4 if opset == 21 else 8, q.size)
    found = [run(model, tmp_path, name)[0] for name, model in (("p", plain), ("s", small), ("w", whole))]
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize(("form", "size", "count"), [("conv", 2, 64), ("matmul", 2, 16), ("gemm_qdq", 4, 200)])
def test_vectors_give_the_same_numbers_from_the_same_kernel(form: str, size: int, count: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(size)
    shape = (ROWS, 24, 3, 3) if form == "conv" else (ROWS, 4 * INPUTS)
    table = rng.integers(-127, 128, (count, size)).astype(np.int8)
    q = table[rng.integers(0, count, int(np.prod(shape)) // size)].reshape(shape)
    plain = layer(form, q.T.copy() if form == "matmul" else q)
    narrow = packed(plain)
    codes, levels = (narrow.graph.initializers[f"w_{part}"].const_value for part in ("codes", "levels"))
    assert codes is not None and levels is not None and levels.shape.numpy() == (count, size)
    assert codes.nbytes == -(-q.size * (count - 1).bit_length() // size // 8)
    assert code_facts(narrow.graph.initializers["w_codes"]) == ((count - 1).bit_length() // size, q.size)
    want, operations = run(plain, tmp_path, "plain")
    got, same = run(narrow, tmp_path, "narrow")
    assert operations[kernel(form)] == 1 and same == operations
    np.testing.assert_array_equal(got, want)


def test_vectors_of_another_weight_need_no_second_table() -> None:
    rng = np.random.default_rng(0)
    table = np.unique(rng.integers(-127, 128, (200, 4)).astype(np.int8), axis=0)
    first, second = (table[np.arange(800) % count].reshape(40, 80) for count in (200, 150))
    own, other = coded(first, 0), coded(second, 0)
    assert own is not None and other is not None and (own.size, own.bits) == (other.size, other.bits) == (4, 8)
    shared = other.on(own)
    assert shared is not None and shared.table is own.table
    np.testing.assert_array_equal(shared.table[shared.codes].reshape(second.shape), second)
    assert own.on(other) is None, "it lacks some vectors"
    third = second.copy()
    third[0, 0] ^= 1
    by_code = coded(third, 0)
    assert by_code is not None and by_code.on(own) is None
