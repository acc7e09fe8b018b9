"""Networks that take or predict more channels than the image has, and conventions of known classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from mezzotint.compiler.calibration.conditions import random_rows
from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.channels import Channels, network_channels
from mezzotint.compiler.frontend.conventions import known_prediction, known_unit
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.graph import weight_store as store
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.session import Denoiser, open_session
from mezzotint.runtime.signature import EXTRA_CHANNELS

PLAIN = Schedule.named("ddpm-linear")
LEARNED = Schedule.from_config({"beta_schedule": "linear", "variance_type": "learned_range"})


def network(path: Path, taken: int, predicted: int, *, shaped: bool) -> Path:
    """One convolution, in a file that does or does not say the shape of its output."""
    rng = np.random.default_rng(taken)
    weight = rng.standard_normal((predicted, taken, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Cast", ["t"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["number", "column"], ["numbers"]),
        helper.make_node("Add", ["c", "numbers"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", taken, 8, 8]),
        helper.make_tensor_value_info("t", TensorProto.INT64, ["batch"]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", predicted if shaped else "channels", 8, 8])
    weights = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([-1, 1, 1, 1]), "column")]
    model = helper.make_model(
        helper.make_graph(nodes, "net", inputs, [output], weights), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 10
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("shaped", [True, False], ids=["shape", "no shape"])
@pytest.mark.parametrize(
    ("taken", "predicted", "schedule", "image"),
    [(9, 4, PLAIN, 4), (3, 6, PLAIN, 3), (9, 8, LEARNED, 4), (5, 5, PLAIN, 5), (4, 4, LEARNED, 4)],
    ids=["inpainting", "variance", "both", "plain", "cut already"],
)
def test_the_program_has_the_channels_of_the_image(
    tmp_path: Path, taken: int, predicted: int, schedule: Schedule, image: int, shaped: bool
) -> None:
    """Its prediction is that of the file for the image and the extra channels behind it."""
    path = network(tmp_path / "net.onnx", taken, predicted, shaped=shaped)
    deployment = Deployment.of(schedule, "ddim", 4)
    (tmp_path / "work").mkdir()
    program = import_onnx(path, tmp_path / "work", schedule=schedule, deployment=deployment)
    extra = taken - image

    assert program.shape == (image, 8, 8)
    assert program.signature.conditions == ((EXTRA_CHANNELS,) if extra else ())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, taken, 8, 8)).astype(np.float32)
    [want] = open_session(path).run(None, {"x": x, "t": np.full(2, 7)})
    net = Denoiser(store.write(program.model, tmp_path / "work"), program.signature)
    rows = {EXTRA_CHANNELS: np.ascontiguousarray(x[:, image:])} if extra else {}
    got = net(np.ascontiguousarray(x[:, :image]), 7, **rows)
    np.testing.assert_allclose(got, want[:, :image], rtol=0, atol=1e-4 * float(np.abs(want).max()))


TOKENS = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[B,N,5] x, int64[B] t) => (float[B,N,6] y)
<float[5,6] w, int64[3] column = {-1, 1, 1}> {
    mixed = MatMul (x, w)
    number = Cast <to = 1> (t)
    numbers = Reshape (number, column)
    y = Add (mixed, numbers)
}
"""


def test_channels_of_tokens_are_split_along_the_last_axis(tmp_path: Path) -> None:
    """5 taken and 6 predicted with learned variances: 3 of the sample, 2 more."""
    model, rng = onnx.parser.parse_model(TOKENS), np.random.default_rng(0)
    weight = rng.standard_normal((5, 6)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "net.onnx")
    (tmp_path / "work").mkdir()
    deployment = Deployment.of(LEARNED, "ddim", 4)
    program = import_onnx(tmp_path / "net.onnx", tmp_path / "work", schedule=LEARNED, deployment=deployment, size=(7,))

    assert (program.shape, program.channels, program.signature.channel_axis) == ((7, 3), 3, 2)
    x = rng.standard_normal((2, 7, 5)).astype(np.float32)
    net = Denoiser(store.write(program.model, tmp_path / "work"), program.signature)
    rows = random_rows(program.conditions(), program.shape, 2, 0)
    assert rows[EXTRA_CHANNELS].shape == (2, 7, 2)
    got = net(np.ascontiguousarray(x[..., :3]), 7, **{EXTRA_CHANNELS: np.ascontiguousarray(x[..., 3:])})
    np.testing.assert_allclose(got, (x @ weight + 7)[..., :3], rtol=1e-5, atol=1e-5)


def test_channels_that_fit_no_image_are_refused() -> None:
    assert network_channels(6, 6, LEARNED, image=3) == Channels(3, 3, 6)
    for taken, predicted, image in ((4, 6, None), (4, 5, None), (3, 7, None), (4, 4, 3), (4, 4, 5)):
        with pytest.raises(ModelError, match=f"takes {taken} channels and predicts {predicted}") as caught:
            network_channels(taken, predicted, PLAIN, image)
        assert "--channels" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("config", "unit", "prediction"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "steps", None),
        ({"_class_name": "FluxTransformer2DModel"}, "fraction", None),
        ({"_class_name": "Lumina2Transformer2DModel"}, "reversed_fraction", "reversed_flow_prediction"),
        ({"_class_name": "SanaTransformer2DModel", "timestep_scale": 1.0}, "steps", None),
        ({"_class_name": "SanaTransformer2DModel", "timestep_scale": 0.001}, "fraction", None),
        ({"_class_name": "SomebodysNet"}, None, None),
        (None, None, None),
    ],
)
def test_known_classes_say_their_unit(config: dict[str, Any] | None, unit: str | None, prediction: str | None) -> None:
    flow = Schedule.named("flow")
    assert known_unit(config, flow) == unit
    assert known_unit(config, PLAIN) is None
    unsaid = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert known_prediction(config, unsaid) == prediction
    assert known_prediction(config, flow) is None, "the configuration says it"
