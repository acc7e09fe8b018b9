"""Common constants of files of one network are stored once, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mezzotint.compiler.mixing import mixture
from mezzotint.compiler.mixing.mixture import SHARED, write_sharing
from mezzotint.runtime.arrays import Floats

RNG = np.random.default_rng(0)
COMMON = RNG.standard_normal((64, 64)).astype(np.float32)
OWN = {name: RNG.standard_normal((64, 64)).astype(np.float32) for name in "ab"}


def network(own: Floats, common: Floats = COMMON, *, small: int = 4) -> onnx.ModelProto:
    """y = (x common) own + bias, with an int8 table of an odd size, so that alignment matters."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "common": common,
        "own": own,
        "bias": np.arange(small, dtype=np.float32).repeat(64 // small),
        "table": np.arange(1025, dtype=np.int8),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "common"], ["h"]),
        helper.make_node("MatMul", ["h", "own"], ["o"]),
        helper.make_node("Add", ["o", "bias"], ["s"]),
        helper.make_node("Gather", ["table", "index"], ["t8"]),
        helper.make_node("Cast", ["t8"], ["t"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["s", "t"], ["y"]),
    ]
    arrays["index"] = np.array([1024], np.int64)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 64]) for n in "xy"]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[1:], [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def written(folder: Path, **models: onnx.ModelProto) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, model in models.items():
        onnx.save(model, folder / f"{name}.onnx")
    return {f"{name}.onnx": folder / f"{name}.onnx" for name in models}


def run(file: Path) -> Floats:
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    found: Floats = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    return found


def outside(file: Path) -> dict[str, str]:
    """Constants in other files, and which."""
    found = {}
    for tensor in onnx.load(file, load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            found[tensor.name] = next(e.value for e in tensor.external_data if e.key == "location")
    return found


def test_equal_constants_are_there_once(tmp_path: Path) -> None:
    sources = written(tmp_path / "in", a=network(OWN["a"]), b=network(OWN["b"]))
    size = write_sharing(sources, tmp_path / "out")

    assert size == COMMON.nbytes + 1025 == (tmp_path / "out" / SHARED).stat().st_size
    for name, source in sources.items():
        file = tmp_path / "out" / name
        assert outside(file) == {"common": SHARED, "table": SHARED}
        assert COMMON.tobytes() not in file.read_bytes()
        np.testing.assert_array_equal(run(file), run(source))
    total = sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert total < sum(f.stat().st_size for f in sources.values()) - 0.9 * size
    onnx.checker.check_model(tmp_path / "out" / "a.onnx", full_check=True)


def test_one_bit_more_and_it_is_its_own(tmp_path: Path) -> None:
    """The twin: constants that are nearly equal must not be shared."""
    changed = COMMON.copy()
    changed[3, 3] = np.nextafter(changed[3, 3], np.float32(9))
    sources = written(tmp_path / "in", a=network(OWN["a"]), b=network(OWN["b"], changed))
    assert write_sharing(sources, tmp_path / "out") == 1025
    for name, source in sources.items():
        np.testing.assert_array_equal(run(tmp_path / "out" / name), run(source))


def test_equal_bytes_of_another_shape_are_shared(tmp_path: Path) -> None:
    other = network(OWN["b"], COMMON.T.copy().reshape(64, 64))
    flat = next(t for t in other.graph.initializer if t.name == "common")
    flat.CopyFrom(numpy_helper.from_array(COMMON.reshape(1, 64, 64), "common"))
    other.graph.output[0].type.tensor_type.shape.Clear()
    del other.graph.output[0].type.tensor_type.shape.dim[:]
    sources = written(tmp_path / "in", a=network(OWN["a"]), b=other)
    assert write_sharing(sources, tmp_path / "out") == COMMON.nbytes + 1025
    shapes = [
        next(list(t.dims) for t in onnx.load(tmp_path / "out" / n, load_external_data=False).graph.initializer)
        for n in sources
    ]
    assert shapes == [[64, 64], [1, 64, 64]]


def test_files_with_nothing_in_common_stay_as_they_are(tmp_path: Path) -> None:
    models = {name: network(OWN[name], OWN[name] + 1) for name in "ab"}
    table = next(t for t in models["b"].graph.initializer if t.name == "table")
    table.CopyFrom(numpy_helper.from_array(np.zeros(1025, np.int8), "table"))
    sources = written(tmp_path / "in", **models)

    assert write_sharing(sources, tmp_path / "out") == 0
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a.onnx", "b.onnx"]
    assert not any(outside(tmp_path / "out" / name) for name in sources)


def test_a_constant_twice_in_one_file_only_is_not_moved(tmp_path: Path) -> None:
    sources = written(tmp_path / "in", a=network(COMMON), b=network(OWN["b"], OWN["b"]))
    write_sharing(sources, tmp_path / "out")
    assert outside(tmp_path / "out" / "a.onnx") == {"table": SHARED}


def test_the_rest_of_a_large_network_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "EXTERNAL_BYTES", 1000)
    sources = written(tmp_path / "in", a=network(OWN["a"]), b=network(OWN["b"]))
    write_sharing(sources, tmp_path / "out")

    assert outside(tmp_path / "out" / "a.onnx") == {"common": SHARED, "table": SHARED, "own": "a.onnx.data"}
    for name, source in sources.items():
        np.testing.assert_array_equal(run(tmp_path / "out" / name), run(source))


def test_weights_of_a_source_may_lie_beside_it(tmp_path: Path) -> None:
    sources = written(tmp_path / "in", a=network(OWN["a"]), b=network(OWN["b"]))
    onnx.save(network(OWN["a"]), sources["a.onnx"], save_as_external_data=True, location="a.data", size_threshold=0)
    write_sharing(sources, tmp_path / "out")

    assert outside(tmp_path / "out" / "a.onnx") == {"common": SHARED, "table": SHARED}
    np.testing.assert_array_equal(run(tmp_path / "out" / "a.onnx"), run(sources["a.onnx"]))


def test_wide_types_come_first(tmp_path: Path) -> None:
    """Every constant starts at a multiple of its type's size: the table's 1025 bytes would shift the next ones."""
    models = {name: network(OWN[name]) for name in "ab"}
    for model in models.values():
        model.graph.initializer.sort(key=lambda t: t.name != "table")
    write_sharing(written(tmp_path / "in", **models), tmp_path / "out")
    tensors = onnx.load(tmp_path / "out" / "a.onnx", load_external_data=False).graph.initializer
    offsets = {t.name: int(e.value) for t in tensors for e in t.external_data if e.key == "offset"}
    assert offsets.get("common", 0) == 0 and offsets["table"] == COMMON.nbytes


def test_the_same_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    sources = written(tmp_path / "in", a=network(OWN["a"]), b=network(OWN["b"]))
    for name in ("one", "two"):
        write_sharing(sources, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
