"""Quantized weights are found with their grids and readers, and replaced without touching anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import Format
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.rounding.weights import find_weights, replace_weight
from mezzotint.runtime.arrays import Floats
from tests.helpers.tiny import program_of

W = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
CLIP = "{n}_c = Clip ({n}_q, low, high)"


def pair(n: str = "d", w: str = "w", s: str = "scale", z: str = "zero", axis: int = 0, clip: bool = False) -> str:
    inner, last = (CLIP.format(n=n), f"{n}_c") if clip else ("", f"{n}_q")
    return f"""{n}_q = QuantizeLinear <axis = {axis}> ({w}, {s}, {z}) {inner}
    {n} = DequantizeLinear <axis = {axis}> ({last}, {s}, {z})"""


def program(body: str, *, w: Floats = W) -> Program:
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    layer (float[batch,4,4,4] sample, int64[batch] timestep) => (float[batch,4,4,4] epsilon)
    <float[{",".join(map(str, w.shape))}] w, float[4] scale = {{0.5, 0.25, 0.125, 1}}, int8[4] zero = {{0, 0, 0, 0}},
     float one = {{0.5}}, int8 none = {{0}}, int8[4] shifted = {{0, 1, 0, 0}}, uint8[4] unsigned = {{0, 0, 0, 0}},
     float[1] three = {{3}}, int8 low = {{-7}}, int8 high = {{7}}, int64[2] flat = {{-1, 4}},
     int64[4] images = {{-1, 4, 4, 4}}>
    {{ {body} }}""")
    value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == "w")
    value.const_value = ir.tensor(w, name="w")
    model.graph.register_initializer(value)
    return program_of(model, shape=(4, 4, 4))


MATMUL = f"{pair(axis=1)} epsilon = MatMul (sample, d)"
GEMMS = """x = Reshape (sample, flat) a = Gemm <transB = 1> (x, d) b = Gemm <transB = 1> (a, d)
    epsilon = Reshape (b, images)"""


@pytest.mark.parametrize(
    ("body", "rows", "scales", "bits"),
    [
        (MATMUL, W.T, [0.5, 0.25, 0.125, 1], 8),
        (f"{pair(axis=0, clip=True)} {GEMMS}", W, [0.5, 0.25, 0.125, 1], 4),
        (f"{pair(axis=1, s='one', z='none')} epsilon = MatMul (sample, d)", W.T, [0.5] * 4, 8),
    ],
)
def test_rows_scales_and_grids(body: str, rows: Floats, scales: list[float], bits: int) -> None:
    (found,) = find_weights(program(body).graph)
    np.testing.assert_array_equal(found.rows(), rows)
    np.testing.assert_array_equal(found.scale(), np.array(scales, np.float32))
    assert found.format == Format(bits, signed=True, symmetric=True)
    assert found.per_row == ("one" not in body)


def test_a_convolution_and_its_names() -> None:
    kernel = np.arange(4 * 4 * 9, dtype=np.float32).reshape(4, 4, 3, 3)
    made = program(f"{pair()} [mine] epsilon = Conv <pads = [1, 1, 1, 1]> (sample, d)", w=kernel)
    (found,) = find_weights(made.graph)
    np.testing.assert_array_equal(found.rows(), kernel.reshape(4, 36))
    assert found.name == "mine"


def test_one_pair_for_several_layers_is_one_weight() -> None:
    (found,) = find_weights(program(f"{pair()} {GEMMS}").graph)
    assert [node.outputs[0].name for node in found.readers] == ["a", "b"]


def test_float_weights_are_none_of_them() -> None:
    assert find_weights(program("epsilon = MatMul (sample, w)").graph) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{pair(axis=1, z='shifted')} epsilon = MatMul (sample, d)", "zero point that is not 0"),
        (f"{pair(axis=1, z='unsigned')} epsilon = MatMul (sample, d)", "grid runs from 0 to 255"),
        (f"{pair(axis=0)} epsilon = MatMul (sample, d)", "do not belong to the outputs"),
        (
            f"{pair(axis=0)} x = Reshape (sample, flat) a = Gemm <transB = 1> (x, d) b = Gemm (a, d) "
            "epsilon = Reshape (b, images)",
            "do not belong to the outputs",
        ),
        (f"s2 = Add (scale, three) {pair(axis=1, s='s2')} epsilon = MatMul (sample, d)", "is not constant"),
    ],
)
def test_what_cannot_be_rounded_is_refused(body: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        find_weights(program(body).graph)


def replaced(made: Program, folder: Path, scale: list[float] | None = None) -> Program:
    (weight, *_) = find_weights(made.graph)
    scales = weight.scale() if scale is None else np.array(scale, np.float32)
    replace_weight(made, weight, np.tile(scales[:, None], 4), scales, folder, "test")
    return made


def test_rows_go_back_the_way_they_came(tmp_path: Path) -> None:
    made = replaced(program(MATMUL), tmp_path)
    np.testing.assert_array_equal(numpy_of(made.graph.initializers["w"]), np.tile([0.5, 0.25, 0.125, 1], (4, 1)))
    np.testing.assert_array_equal(numpy_of(made.graph.initializers["scale"]), [0.5, 0.25, 0.125, 1])
    (weight,) = find_weights(made.graph)
    np.testing.assert_array_equal(weight.rows(), np.tile(np.array([[0.5], [0.25], [0.125], [1]]), 4))


def test_other_readers_of_the_constant_keep_it(tmp_path: Path) -> None:
    made = program(f"{pair(axis=1)} a = MatMul (sample, d) epsilon = MatMul (a, w)")
    replaced(made, tmp_path)
    np.testing.assert_array_equal(numpy_of(made.graph.initializers["w"]), W)
    (weight,) = find_weights(made.graph)
    assert name_of(weight.value) == "w_rounded"


def test_two_grids_for_one_constant_become_two_constants(tmp_path: Path) -> None:
    both = f"{pair(axis=1)} {pair('e', s='one', z='none', axis=1)} a = MatMul (sample, d) epsilon = MatMul (a, e)"
    made = program(both)
    replaced(made, tmp_path)
    first, second = find_weights(made.graph)
    assert (name_of(first.value), name_of(second.value)) == ("w_rounded", "w")
    np.testing.assert_array_equal(second.rows(), W.T)


def test_new_scales_are_written_where_they_belong_to_nobody_else(tmp_path: Path) -> None:
    made = replaced(program(MATMUL), tmp_path, [1, 2, 3, 4])
    np.testing.assert_array_equal(numpy_of(made.graph.initializers["scale"]), [1, 2, 3, 4])
    shared = f"{pair(axis=1)} a = MatMul (sample, d) b = Mul (a, scale) epsilon = Add (b, a)"
    replaced(program(shared), tmp_path)
    with pytest.raises(PassError, match="belongs to other quantizers"):
        replaced(program(shared), tmp_path, [1, 2, 3, 4])


def test_large_constants_are_stored_behind_the_weights(tmp_path: Path) -> None:
    (tmp_path / store.WEIGHTS).write_bytes(b"before")
    arrays = [np.random.default_rng(k).standard_normal((32, 33)).astype(np.float32) for k in range(2)]
    kept = [store.kept(array, f"a{k}", tmp_path) for k, array in enumerate(arrays)]
    assert isinstance(store.kept(np.zeros(4, np.float32), "small", tmp_path), ir.Tensor)
    for tensor, array in zip(kept, arrays, strict=True):
        assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
        assert tensor.offset % store.ALIGNMENT == 0
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert (tmp_path / store.WEIGHTS).read_bytes().startswith(b"before")


def test_a_session_can_end_at_its_taps(tmp_path: Path) -> None:
    made = program(f"{pair(axis=1)} a = MatMul (sample, d) epsilon = MatMul (a, w)")
    x = np.ones((1, 4, 4, 4), np.float32)
    with Executor(made.model, tmp_path, taps=["a"], threads=1) as whole:
        want = whole.call(made.signature, x, 0)
    with Executor(made.model, tmp_path, taps=["a"], threads=1, only_taps=True) as prefix:
        got = prefix.call(made.signature, x, 0)
    assert list(got) == ["a"] and set(want) == {"a", "epsilon"}
    np.testing.assert_array_equal(got["a"], want["a"])
    assert [v.name for v in made.graph.outputs] == ["epsilon"]
