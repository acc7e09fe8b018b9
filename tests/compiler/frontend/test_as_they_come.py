"""Files as other tools leave them: nodes in any order, half precision inside, engines' nodes, all sizes of inputs."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mezzotint import compile_model
from mezzotint.compiler.errors import ConditionError, ModelError
from mezzotint.compiler.frontend.from_onnx import load_onnx
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.lowering.any_timestep import take_any_timestep
from mezzotint.runtime.session import open_session
from mezzotint.runtime.signature import Signature
from tests.helpers.models import CONTEXT, SMALL, hand_written, write

X = np.random.default_rng(1).standard_normal((2, 1, 8, 8)).astype(np.float32)
HALVES = [TensorProto.FLOAT16, TensorProto.BFLOAT16]


def run(path: Path, **feeds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(open_session(path, threads=2).run(None, feeds)[0])


def shuffled(model: onnx.ModelProto) -> onnx.ModelProto:
    nodes = list(model.graph.node)
    random.Random(2).shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def halved(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """Half precision between the float32 ends, the Casts at the end of the list, as converters leave them."""
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(helper.make_tensor(tensor.name, kind, tensor.dims, numpy_helper.to_array(tensor).flatten()))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to":
                attribute.i = kind
        for names, end in ((node.input, "x"), (node.output, "y")):
            names[:] = [f"{name}_half" if name == end else name for name in names]
    graph.node.append(helper.make_node("Cast", ["x"], ["x_half"], name="narrow", to=kind))
    graph.node.append(helper.make_node("Cast", ["y_half"], ["y"], name="widen", to=TensorProto.FLOAT))
    return model


def test_nodes_in_any_order_are_sorted(tmp_path: Path) -> None:
    path = write(shuffled(hand_written()), tmp_path / "m.onnx")
    in_order = write(hand_written(), tmp_path / "sorted.onnx")
    bundles = [compile_model(p, tmp_path / f"{p.stem}-b", recipe="w8a8", **SMALL) for p in (path, in_order)]
    first, second = (bundle.denoiser(threads=2)(X, 750) for bundle in bundles)
    np.testing.assert_array_equal(first, second)


def test_nodes_in_a_ring_are_refused(tmp_path: Path) -> None:
    model = hand_written()
    first = next(node for node in model.graph.node if node.name == "second")
    first.input[0] = "h5.act"  # what comes of its own output
    with pytest.raises(ModelError, match="cannot be put in order") as caught:
        load_onnx(write(model, tmp_path / "m.onnx"))
    assert caught.value.hint


@pytest.mark.parametrize("kind", HALVES)
def test_half_precision_inside_is_widened_exactly(tmp_path: Path, kind: int) -> None:
    half, plain = halved(hand_written(), kind), hand_written()
    model = load_onnx(write(half, tmp_path / "half.onnx"))
    stored = {tensor.name: tensor for tensor in half.graph.initializer}
    assert not [
        node for node in model.graph if any(v.dtype is not None and v.dtype.itemsize == 2 for v in node.outputs)
    ]
    for name, value in model.graph.initializers.items():
        array = numpy_of(value)
        assert array.dtype in (np.float32, np.int64)
        np.testing.assert_array_equal(array, numpy_helper.to_array(stored[name]).astype(array.dtype))
    bundle = compile_model(tmp_path / "half.onnx", tmp_path / "b", recipe="float", **SMALL)
    t = np.array([750, 750])
    want = run(write(plain, tmp_path / "plain.onnx"), x=X, t=t)
    assert np.abs(bundle.denoiser(threads=2)(X, 750) - want).max() < 0.02 * np.abs(want).max()


def test_half_ends_stay_half_and_are_refused(tmp_path: Path) -> None:
    path = write(hand_written(dtype=TensorProto.FLOAT16), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="FLOAT16, not float32"):
        compile_model(path, tmp_path / "b", **SMALL)


FOREIGN = [
    ("com.microsoft", "FusedConv", "optimized for onnxruntime: node 'n' is a FusedConv"),
    ("com.microsoft.nchwc", "Conv", "optimized for onnxruntime: node 'n' is a Conv"),
    ("com.ms.internal.nhwc", "Conv", "optimized for onnxruntime"),
    ("com.microsoft", "QLinearAdd", "quantized already: node 'n' is a QLinearAdd"),
    ("com.microsoft", "MatMulNBits", "quantized already"),
    ("", "DynamicQuantizeLinear", "quantized already"),
    ("trt.plugins", "EfficientNMS", "optimized for TensorRT"),
    ("my.own", "Magic", "of the domain 'my.own'"),
    ("", "RandomNormalLike", "draws random numbers"),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("domain", "op", "complaint"), FOREIGN)
def test_foreign_nodes_are_named(tmp_path: Path, domain: str, op: str, complaint: str, nested: bool) -> None:
    model = hand_written()
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    outputs = ["foreign", *(["scale", "zero"] if op == "DynamicQuantizeLinear" else [])]
    node = helper.make_node(op, ["x"], outputs, name="n", domain=domain)
    if nested:
        out = helper.make_tensor_value_info("foreign", TensorProto.FLOAT, None)
        branch = helper.make_graph([node], "branch", [], [out])
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        node = helper.make_node("If", ["yes"], ["chosen"], name="if", then_branch=branch, else_branch=branch)
    model.graph.node.append(node)
    with pytest.raises(ModelError, match=complaint) as caught:
        load_onnx(write(model, tmp_path / "m.onnx"))
    assert caught.value.hint


def with_sizes(time: list[int | str], *, batch: int | str = "batch", kind: int = TensorProto.INT64) -> onnx.ModelProto:
    """The hand-written denoiser with a timestep of this shape."""
    model = hand_written(batch=batch, time_dtype=kind)
    model.graph.input[1].CopyFrom(helper.make_tensor_value_info("t", kind, time))
    if not time:  # its Unsqueeze wants a vector
        model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
        model.graph.node.insert(0, helper.make_node("Reshape", ["t", "one"], ["t_vector"]))
        model.graph.node[1].input[0] = "t_vector"
    return model


TIMES: list[list[int | str]] = [[], [1], [2], ["batch"], ["steps"]]
KINDS: dict[int, type[Any]] = {TensorProto.INT64: np.int64, TensorProto.INT32: np.int32, TensorProto.FLOAT: np.float32}


@pytest.mark.parametrize(("time", "kind"), [*itertools.product(TIMES, [TensorProto.INT64]), (["batch"], 6), ([], 1)])
def test_the_written_file_takes_a_timestep_of_any_rank(tmp_path: Path, time: list[int | str], kind: int) -> None:
    source = write(with_sizes(time, kind=kind), tmp_path / "m.onnx")
    bundle = compile_model(source, tmp_path / "b", recipe="w8a8-steps", **SMALL)
    session = open_session(bundle.model_path, threads=2)
    assert [len(value.shape) for value in session.get_inputs()] == [4, 0]
    assert session.get_inputs()[0].shape[0] == (2 if time == [2] else "batch")
    outputs = [session.run(None, {"x": X, "t": np.full(shape, 750, KINDS[kind])})[0] for shape in ((), (1,), (2,))]
    for output in (*outputs[1:], bundle.denoiser(threads=2)(X, 750)):
        np.testing.assert_array_equal(output, outputs[0])
    want = run(source, x=X, t=np.full([2 if isinstance(n, str) else n for n in time], 750, KINDS[kind]))
    assert np.abs(outputs[0] - want).max() < 0.2 * np.abs(want).max()


@pytest.mark.parametrize("time", TIMES)
def test_a_graph_without_tables_takes_a_timestep_of_any_rank(tmp_path: Path, time: list[int | str]) -> None:
    source = write(with_sizes(time), tmp_path / "m.onnx")
    model = take_any_timestep(ir.load(source), Signature("x", "t", "y"))
    ir.save(model, tmp_path / "any.onnx")
    shapes = [(), (1,), (2,), ([2 if isinstance(n, str) else n for n in time])]
    *outputs, want = (run(tmp_path / "any.onnx", x=X, t=np.full(shape, 7)) for shape in shapes)
    for output in outputs:
        np.testing.assert_allclose(output, want, atol=1e-5)
    np.testing.assert_allclose(want, run(source, x=X, t=np.full(shapes[-1], 7)), atol=1e-5)
    if time in ([2], ["batch"], ["steps"]):  # a timestep for each sample
        several = np.array([10, 900])
        np.testing.assert_allclose(run(tmp_path / "any.onnx", x=X, t=several), run(source, x=X, t=several), atol=1e-5)


def test_two_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"different batches: 't' is \[3\], 'x' \[2,1,8,8\]"):
        compile_model(write(with_sizes([3], batch=2), tmp_path / "m.onnx"), tmp_path / "b", **SMALL)


ROW = np.random.default_rng(4).standard_normal((1, CONTEXT)).astype(np.float32)
CONDITIONS: dict[str, tuple[list[int | str], np.ndarray[Any, Any]]] = {
    "one row": ([1, CONTEXT], ROW),
    "one row, given twice": ([1, CONTEXT], np.repeat(ROW, 2, 0)),
    "a number": ([], np.array(0.5, np.float32)),
    "a number as a row": ([], np.full(1, 0.5, np.float32)),
}


def with_condition(shape: list[int | str]) -> onnx.ModelProto:
    model = hand_written(context="c")
    model.graph.input[2].CopyFrom(helper.make_tensor_value_info("c", TensorProto.FLOAT, shape))
    if not shape:
        model.graph.initializer.append(numpy_helper.from_array(ROW, "row"))
        model.graph.node.insert(0, helper.make_node("Mul", ["c", "row"], ["c_row"]))
        mix = next(node for node in model.graph.node if node.name == "mix")
        mix.input[0] = "c_row"
    return model


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_of_one_row_or_a_number_serves_all_samples(tmp_path: Path, name: str) -> None:
    shape, rows = CONDITIONS[name]
    source = write(with_condition(shape), tmp_path / "m.onnx")
    bundle = compile_model(source, tmp_path / "b", recipe="w8a8-steps", conditions={"c": rows}, **SMALL)
    assert np.isfinite(bundle.sample(2, conditions={"c": rows})).all()
    row = rows.reshape(-1, *shape[1:])[:1]
    got = bundle.denoiser(threads=2)(X, 750, c=np.repeat(row, 2, 0))
    want = run(source, x=X, t=np.array([750, 750]), c=row.reshape([int(n) for n in shape]))
    assert np.abs(got - want).max() < 0.2 * np.abs(want).max()


def test_rows_that_differ_are_refused_where_one_serves_all(tmp_path: Path) -> None:
    source = write(with_condition([1, CONTEXT]), tmp_path / "m.onnx")
    rows = np.concatenate([ROW, -ROW])
    with pytest.raises(ConditionError, match="one 'c' for all samples"):
        compile_model(source, tmp_path / "b", conditions={"c": rows}, **SMALL)
