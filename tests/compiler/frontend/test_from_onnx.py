"""ONNX files as they come: what is read, and what is refused with a word on what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import CompileError, ModelError, SignatureError
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.graph import weight_store as store
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.session import Denoiser
from tests.helpers.models import CHANNELS, hand_written, write

X = np.random.default_rng(1).standard_normal((3, 1, 8, 8)).astype(np.float32)
Read = Callable[..., Program]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Import a file into an empty working folder."""

    def run(path: Path, **options: Any) -> Program:
        folder = tmp_path / f"work{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        schedule = options.pop("schedule", None) or Schedule.named("ddpm-linear")
        return import_onnx(path, folder, schedule=schedule, deployment=Deployment.of(schedule, "ddim", 4), **options)

    return run


def refused(read: Read, path: Path, complaint: str, **options: Any) -> CompileError:
    """The refusal; it says where, and what to do."""
    with pytest.raises(CompileError, match=complaint) as caught:
        read(path, **options)
    assert path.name in (caught.value.where or "")
    assert caught.value.hint
    return caught.value


def weight(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(t for t in model.graph.initializer if t.name == name)
    return found


def test_a_hand_written_file_becomes_a_program(tmp_path: Path, read: Read) -> None:
    proto = hand_written()
    path = write(proto, tmp_path / "m.onnx")
    program = read(path)

    signature = program.signature
    assert (signature.sample, signature.timestep, signature.output, signature.conditions) == ("x", "t", "y", ())
    assert signature.prediction == "epsilon"
    assert program.shape == (1, 8, 8)
    assert program.fixed_batch is None
    floats = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert program.source["parameter_bytes"] == sum(a.nbytes for a in floats)
    assert (program.source["kind"], program.source["name"]) == ("onnx", "m.onnx")
    with Executor(program.model, _folder(program), threads=2) as executor:
        got = executor.call(signature, X, 7)["y"]
    np.testing.assert_array_equal(got, Denoiser(path, signature, threads=2)(X, 7))


def test_the_configuration_is_kept_without_private_keys(tmp_path: Path, read: Read) -> None:
    path = write(hand_written(), tmp_path / "m.onnx")
    config = {"sample_size": 8, "_name_or_path": "somewhere", "_diffusers_version": "0.42.1", "_class_name": "Net"}

    kept = read(path, config=config).source["config"]

    assert list(kept.items()) == [("_class_name", "Net"), ("_diffusers_version", "0.42.1"), ("sample_size", 8)]
    assert "config" not in read(path).source


def test_the_schedule_says_what_is_predicted_unless_the_user_does(tmp_path: Path, read: Read) -> None:
    path = write(hand_written(), tmp_path / "m.onnx")
    schedule = Schedule.from_config({"beta_schedule": "linear", "prediction_type": "v_prediction"})

    assert read(path, schedule=schedule).signature.prediction == "v_prediction"
    assert read(path, schedule=schedule, prediction="sample").signature.prediction == "sample"


def test_open_height_and_width_need_a_size(tmp_path: Path, read: Read) -> None:
    path = write(hand_written(size=("h", "w")), tmp_path / "m.onnx")

    error = refused(read, path, r"open shape \[batch,1,h,w\]")
    assert "--size" in (error.hint or "")
    assert read(path, size=(16, 8)).shape == (1, 16, 8)


def test_a_size_that_the_graph_forbids_is_refused(tmp_path: Path, read: Read) -> None:
    path = write(hand_written(), tmp_path / "m.onnx")

    refused(read, path, "samples are 8x8, not 16x16", size=(16, 16))
    assert read(path, size=(8, 8)).shape == (1, 8, 8)


def test_a_batch_that_is_written_in_is_known(tmp_path: Path, read: Read) -> None:
    assert read(write(hand_written(batch=4), tmp_path / "m.onnx")).fixed_batch == 4


def test_external_data_is_streamed_into_the_working_folder(tmp_path: Path, read: Read) -> None:
    plain = read(write(hand_written(), tmp_path / "plain.onnx"))
    path = write(hand_written(), tmp_path / "m.onnx", external="m.weights")
    program = read(path)
    (tmp_path / "m.weights").unlink()

    tensors = {n: v.const_value for n, v in program.graph.initializers.items()}
    large = tensors["second.w"]
    assert isinstance(large, ir.ExternalTensor)
    assert large.location == store.WEIGHTS
    for name, value in plain.graph.initializers.items():
        tensor = tensors[name]
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == store.WEIGHTS:
            assert value.const_value is not None
            np.testing.assert_array_equal(tensor.numpy(), value.const_value.numpy())
    assert program.source["parameter_bytes"] == plain.source["parameter_bytes"]


def test_missing_external_data(tmp_path: Path, read: Read) -> None:
    path = write(hand_written(), tmp_path / "m.onnx", external="m.weights")
    (tmp_path / "m.weights").unlink()

    error = refused(read, path, "external data is missing: m.weights")
    assert isinstance(error, ModelError)


def test_shortened_external_data(tmp_path: Path, read: Read) -> None:
    path = write(hand_written(), tmp_path / "m.onnx", external="m.weights")
    data = (tmp_path / "m.weights").read_bytes()
    (tmp_path / "m.weights").write_bytes(data[:-1])

    with pytest.raises(ModelError, match=r"shorter than the constant .* needs") as caught:
        read(path)
    assert "m.weights" in (caught.value.where or "")
    assert caught.value.hint


@pytest.mark.parametrize("opset", [11, 12])
def test_old_opsets(tmp_path: Path, read: Read, opset: int) -> None:
    refused(read, write(hand_written(opset=opset), tmp_path / "m.onnx"), f"opset {opset}; 13 is the oldest")


@pytest.mark.parametrize("opset", [13, 15, 17, 18, 21])
def test_later_opsets(tmp_path: Path, read: Read, opset: int) -> None:
    assert read(write(hand_written(opset=opset), tmp_path / "m.onnx")).shape == (1, 8, 8)


def test_a_quantized_model(tmp_path: Path, read: Read) -> None:
    model = hand_written()
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(0, np.uint8), "zero")
    model.graph.initializer.extend([scale, zero])
    model.graph.node.insert(0, onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quant"))

    error = refused(read, write(model, tmp_path / "m.onnx"), "quantized already: node 'quant'")
    assert "float model" in (error.hint or "")


def test_half_precision(tmp_path: Path, read: Read) -> None:
    refused(read, write(hand_written(dtype=TensorProto.FLOAT16), tmp_path / "m.onnx"), "FLOAT16, not float32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["second.w", "last.b"])  # one lies in the weights' file, one in the graph
@pytest.mark.parametrize("external", [None, "m.weights"])
def test_weights_that_are_not_finite(tmp_path: Path, read: Read, value: float, name: str, external: str | None) -> None:
    model = hand_written()
    tensor = weight(model, name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[-1] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))

    refused(read, write(model, tmp_path / "m.onnx", external=external), f"'{name}' holds NaN or infinite values")


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, read: Read, kept: float) -> None:
    path = tmp_path / "m.onnx"
    whole = hand_written().SerializeToString()
    path.write_bytes(whole[: int(len(whole) * kept)])

    refused(read, path, "not an ONNX model, or it is truncated|holds no graph")


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 64, b"# A model\n\nIt is elsewhere.\n", b"\x89PNG\r\n\x1a\n" + bytes(99)]
)
def test_a_file_of_something_else(tmp_path: Path, read: Read, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)

    refused(read, path, "not an ONNX model|holds no graph")


def test_no_recognisable_timestep(tmp_path: Path, read: Read) -> None:
    path = write(hand_written(timestep="class_labels"), tmp_path / "m.onnx")

    error = refused(read, path, "recognised as the timestep")
    assert isinstance(error, SignatureError)
    assert read(path, inputs={"timestep": "class_labels"}).signature.timestep == "class_labels"


def test_conditions_are_all_other_inputs(tmp_path: Path, read: Read) -> None:
    program = read(write(hand_written(context="prompt"), tmp_path / "m.onnx"))

    assert program.signature.conditions == ("prompt",)
    assert list(program.conditions()) == ["prompt"]


def test_the_weights_are_named_by_their_hash(tmp_path: Path, read: Read) -> None:
    model = hand_written()
    shas = [read(write(model, tmp_path / name)).source["weights_sha256"] for name in ("a.onnx", "b.onnx")]
    tensor = weight(model, "second.w")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), "second.w"))
    changed = read(write(model, tmp_path / "c.onnx")).source["weights_sha256"]

    assert shas[0] == shas[1] != changed
    assert numpy_helper.to_array(tensor).shape == (CHANNELS, CHANNELS, 3, 3)


def _folder(program: Program) -> Path:
    """The working folder, as the stored weights know it."""
    tensors = (v.const_value for v in program.graph.initializers.values())
    return next(Path(t.base_dir) for t in tensors if isinstance(t, ir.ExternalTensor))
