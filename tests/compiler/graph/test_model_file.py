"""Model files: what is valid is read as it is, and each limit can be raised. tests/whole/ has the hostile ones."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.graph.limits import LIMITS, limit, variable
from mezzotint.compiler.graph.model_file import read_model

SIZE = 600  # numbers of a weight that is stored outside


def model(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """A graph that computes y from x."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIZE]) for name in "xy")
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def loop(turns: int) -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Neg", ["s"], ["t"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [SIZE]),
        ],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, [SIZE]),
        ],
    )
    return model(helper.make_node("Loop", ["n", "", "x"], ["y"], body=body), n=np.array(turns, np.int64))


def chain(length: int) -> onnx.ModelProto:
    names = ["x", *(f"v{i}" for i in range(length - 1)), "y"]
    return model(*(helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)))


@pytest.mark.parametrize(("name", "build"), [("operations", loop), ("nodes", chain)])
def test_a_limit_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, build: object) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(build(70), path)  # type: ignore[operator]
    read_model(path)
    monkeypatch.setenv(variable(name), "60")
    with pytest.raises(ModelError, match="the limit is 60") as caught:
        read_model(path)
    assert variable(name) in (caught.value.hint or "")
    monkeypatch.setenv(variable(name), "80")
    read_model(path)


@pytest.mark.parametrize("text", ["x", "0", "-5", "9" * 5000, "1e9", "²"])
def test_a_limit_that_is_no_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for name in LIMITS:
        monkeypatch.setenv(variable(name), text)
        with pytest.raises(ModelError, match="not a positive integer"):
            limit(name)


def test_nodes_are_sorted_and_sorted_ones_stay(tmp_path: Path) -> None:
    ordered = chain(5)
    onnx.save(ordered, tmp_path / "a.onnx")
    names = [node.outputs[0].name for node in read_model(tmp_path / "a.onnx").graph]
    assert names == [node.output[0] for node in ordered.graph.node]
    nodes = list(ordered.graph.node)[::-1]
    del ordered.graph.node[:]
    ordered.graph.node.extend(nodes)
    onnx.save(ordered, tmp_path / "b.onnx")
    assert [node.outputs[0].name for node in read_model(tmp_path / "b.onnx").graph] == names


@pytest.mark.parametrize("linked", [False, True])
def test_external_data(tmp_path: Path, linked: bool) -> None:
    """The cache of the hub has links to the model and to its data, in a folder that has neither."""
    weight = np.arange(SIZE, dtype=np.float32)
    folder = tmp_path / ("blobs" if linked else "m")
    folder.mkdir()
    add = model(helper.make_node("Add", ["x", "w"], ["y"]), w=weight)
    onnx.save(add, folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    if linked:
        (tmp_path / "m").mkdir()
        for name in ("model.onnx", "model.data"):
            (tmp_path / "m" / name).symlink_to(folder / name)
    value = read_model(tmp_path / "m" / "model.onnx").graph.initializers["w"].const_value
    assert value is not None
    assert np.array_equal(value.numpy(), weight)
