"""Real onnxruntime sessions: what a denoiser computes, and what it refuses before computing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.errors import InputError, MixedTimesteps, TimestepNotDeployed
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.session import Denoiser, open_session
from mezzotint.runtime.signature import Signature

Build = Callable[..., bytes]
WEIGHT = np.array([0.1, -0.2, 0.3, 0.05, 0.6, -0.1, 0.2, 0.1, -0.3]).reshape(3, 3)


def by_hand(x: Floats, t: float) -> npt.NDArray[np.float64]:
    padded = np.pad(x[:, 0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    total = sum(WEIGHT[i, j] * padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3))
    return (np.asarray(total) * (1 + t / 1000))[:, None]


def check_output(found: Floats, x: Floats, t: int) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(x, t), rtol=0, atol=2e-6)


@pytest.mark.parametrize("declared", ["int64[B]", "int64[1]", "int64[N]", "int64", "float[B]", "int32[B]", "double"])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_computes_the_graph_however_the_timestep_is_declared(
    denoiser_onnx: Build, signature: Signature, declared: str, batch: int
) -> None:
    denoiser = Denoiser(denoiser_onnx(declared), signature, threads=1)
    x = initial_noise(1, (batch, 1, 8, 8))
    times: list[Any] = [250, np.int64(250), np.array(250), np.array([250]), np.full(batch, 250), np.float32(250)]
    for t in times:
        found = denoiser(x, t)
        check_output(found, x, 250)
        with pytest.raises(AssertionError):
            check_output(found * np.float32(1.01), x, 250)


def test_results_belong_to_the_caller(denoiser_onnx: Build, signature: Signature) -> None:
    denoiser = Denoiser(denoiser_onnx(), signature, threads=1)
    x = initial_noise(1, (2, 1, 8, 8))
    first = denoiser(x, 10)
    kept = first.copy()
    second = denoiser(x[:1], 900)
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, kept)
    given = np.empty_like(x)
    assert denoiser(x, 10, out=given) is given
    np.testing.assert_array_equal(given, first)
    wrongs: list[Any] = [given[:1], given.astype(np.float64), np.empty((2, 1, 8, 16), np.float32)[..., ::2]]
    for wrong in wrongs:
        with pytest.raises(InputError, match="out is"):
            denoiser(x, 10, out=wrong)


def test_a_view_is_read_as_it_looks(denoiser_onnx: Build, signature: Signature) -> None:
    wide = initial_noise(1, (2, 1, 8, 16))
    check_output(Denoiser(denoiser_onnx(), signature)(wide[..., ::2], 5), wide[..., ::2], 5)


def test_conditions(denoiser_onnx: Build, signature: Signature) -> None:
    signature = replace(signature, conditions=("context",))
    denoiser = Denoiser(denoiser_onnx(context="float[B,4]"), signature, threads=1)
    assert denoiser.input_names == ("sample", "timestep", "context")
    x = initial_noise(1, (2, 1, 8, 8))
    context = np.array([[1, 1, 1, 1], [0, 4, 0, 0]], dtype=np.float32)
    np.testing.assert_allclose(denoiser(x, 100, context=context), by_hand(x, 100) + 1, rtol=0, atol=2e-6)
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, r"conditions \[\] were given"),
        ({"context": context, "label": context}, r"takes \['context'\]"),
        ({"context": context.astype(np.float64)}, "input 'context' is float64"),
        ({"context": context[0]}, r"input 'context' is float32 \[4\]"),
        ({"context": context[:, :3]}, "axis 1"),
        ({"context": context[:1]}, "axis 0, where B is 2"),
        ({"context": [1, 2]}, "input 'context' is list"),
    ]
    for conditions, message in refused:
        with pytest.raises(InputError, match=message):
            denoiser(x, 100, **conditions)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 1, 8, 8)), "is float64"),
        (np.zeros((1, 8, 8), np.float32), r"is float32 \[1, 8, 8\]"),
        (np.zeros((2, 3, 8, 8), np.float32), r"expected float32 \['B', 1, 8, 8\]"),
        (np.zeros((2, 1, 8, 9), np.float32), "axis 3"),
        (np.zeros((0, 1, 8, 8), np.float32), "axis 0"),
        (None, "'sample' is NoneType"),
    ],
)
def test_refused_samples(denoiser_onnx: Build, signature: Signature, x: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Denoiser(denoiser_onnx(), signature)(x, 5)


def test_one_call_has_one_timestep(denoiser_onnx: Build, signature: Signature) -> None:
    denoiser = Denoiser(denoiser_onnx(), signature, deployed=[900, 500, 100])
    x = initial_noise(1, (2, 1, 8, 8))
    check_output(denoiser(x, 500), x, 500)
    with pytest.raises(MixedTimesteps, match=r"\[100, 500\]"):
        denoiser(x, np.array([500, 100]))
    with pytest.raises(TimestepNotDeployed, match=r"timestep 501 .* nearest are 500, 900") as caught:
        denoiser(x, 501)
    assert "--steps" in str(caught.value)
    with pytest.raises(InputError, match=r"timestep 0\.5 lies between two .* 'timestep' is int64") as refused:
        denoiser(x, 0.5)
    assert "timestep_spacing" in str(refused.value)
    wrong: list[Any] = [-1, -0.5, float("nan"), float("inf"), True, "5", None, np.zeros((2, 1)), np.zeros(3, int)]
    for t in wrong:
        with pytest.raises(InputError, match="timestep"):
            denoiser(x, t)


@pytest.mark.parametrize("declared", ["float[B]", "double[1]", "float"])
def test_timesteps_between_training_timesteps(denoiser_onnx: Build, signature: Signature, declared: str) -> None:
    denoiser = Denoiser(denoiser_onnx(declared), signature, deployed=[999.0, 499.5, 0], threads=1)
    x = initial_noise(1, (2, 1, 8, 8))
    times: list[Any] = [499.5, np.float32(499.5), np.array(499.5), np.full(2, 499.5)]
    for t in times:
        np.testing.assert_allclose(denoiser(x, t), by_hand(x, 499.5), rtol=0, atol=2e-6)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(denoiser(x, 499.5), by_hand(x, 509.5), rtol=0, atol=2e-6)
    check_output(denoiser(x, 999), x, 999)
    denoiser(x, np.nextafter(np.float32(499.5), np.float32(0)))  # another library's last bit
    for missing in (499, 499.502, 500):
        with pytest.raises(TimestepNotDeployed, match=r"has no row in this graph's tables; the nearest are .*499\.5"):
            denoiser(x, missing)
    with pytest.raises(MixedTimesteps, match=r"\[499\.5, 999\.0\]"):
        denoiser(x, np.array([999, 499.5]))
    with pytest.raises(InputError, match="between two training timesteps"):
        Denoiser(denoiser_onnx("int32[B]"), signature)(x, 499.5)


def test_a_batch_that_is_written_into_the_graph(denoiser_onnx: Build, signature: Signature) -> None:
    denoiser = Denoiser(denoiser_onnx("int64[2]", batch="2"), signature)
    assert denoiser.fixed_batch == 2
    assert Denoiser(denoiser_onnx(), signature).fixed_batch is None
    x = initial_noise(1, (3, 1, 8, 8))
    check_output(denoiser(x[:2], 5), x[:2], 5)
    with pytest.raises(InputError, match="axis 0"):
        denoiser(x, 5)


def test_signatures_that_do_not_fit(denoiser_onnx: Build, signature: Signature) -> None:
    for other in (
        replace(signature, sample="x"),
        replace(signature, conditions=("context",)),
        replace(signature, output="noise"),
    ):
        with pytest.raises(InputError, match="the signature names"):
            Denoiser(denoiser_onnx(), other)
    with pytest.raises(InputError, match="the signature names"):
        Denoiser(denoiser_onnx(context="float[B,4]"), signature)
    with pytest.raises(InputError, match="which numpy does not have"):
        Denoiser(denoiser_onnx("bfloat16[B]"), signature)


def test_what_onnxruntime_finds_in_the_call_is_an_input_error(signature: Signature) -> None:
    """A dimension that the graph leaves open, with a value that an inner node cannot take."""
    broken = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Reshape", ["sample", "shape"], ["epsilon"])],
            "broken",
            [
                onnx.helper.make_tensor_value_info("sample", onnx.TensorProto.FLOAT, ["B", 1, "H", "W"]),
                onnx.helper.make_tensor_value_info("timestep", onnx.TensorProto.INT64, ["B"]),
            ],
            [onnx.helper.make_tensor_value_info("epsilon", onnx.TensorProto.FLOAT, ["B", 1, 8, 8])],
            [onnx.numpy_helper.from_array(np.array([-1, 1, 8, 8]), "shape")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 21)],
        ir_version=10,
    )
    denoiser = Denoiser(broken.SerializeToString(), signature)
    with pytest.raises(InputError, match="onnxruntime refused the call") as caught:
        denoiser(np.zeros((1, 1, 5, 5), np.float32), 5)
    assert caught.value.where == "x float32 [1, 1, 5, 5], timestep 5"


def test_models_that_cannot_be_opened(tmp_path: Path, denoiser_onnx: Build) -> None:
    with pytest.raises(InputError, match="cannot open") as caught:
        open_session(tmp_path / "missing.onnx")
    assert caught.value.where == str(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match="cannot open"):
        open_session(b"junk")
    with pytest.raises(InputError, match="0 threads"):
        open_session(denoiser_onnx(), threads=0)


def test_the_optimized_graph_can_be_read(tmp_path: Path, denoiser_onnx: Build) -> None:
    data = denoiser_onnx()
    built = {}
    for level in ("all", "basic", "none"):
        file = tmp_path / f"{level}.onnx"
        session = open_session(data, threads=2, optimized=file, level=level)
        assert session.get_session_options().intra_op_num_threads == 2
        built[level] = [node.op_type for node in onnx.load(str(file)).graph.node]
    assert "Identity" in built["none"]
    assert "Identity" not in built["all"]


def test_large_initializers_go_beside_the_optimized_graph(tmp_path: Path) -> None:
    file = tmp_path / "optimized.onnx"
    open_session(matmul(np.ones((256, 128), np.float32)), optimized=file)
    assert (tmp_path / "optimized.onnx.data").stat().st_size >= 256 * 128 * 4


def test_four_bit_weights_do_not_round_the_activations(tmp_path: Path) -> None:
    """onnxruntime's default quantizes the activations too, with 0.8 % error; this file asks for what the graph says."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-8, 8, (256, 128)).astype(np.int8)
    scale = (rng.random((8, 128)) * 0.1 + 0.01).astype(np.float32)
    x = rng.standard_normal((4, 256)).astype(np.float32)
    file = tmp_path / "optimized.onnx"
    found = open_session(matmul(weight, scale), optimized=file).run(None, {"x": x})[0]
    assert [node.op_type for node in onnx.load(str(file)).graph.node] == ["MatMulNBits"]
    wanted = x @ (weight * np.repeat(scale, 32, axis=0))
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error < 1e-5
    assert np.abs(found * 1.01 - wanted).max() / np.abs(wanted).max() > 1e-5


def matmul(weight: npt.NDArray[Any], scale: Floats | None = None) -> bytes:
    """x [B, K] times a float weight, or a 4-bit weight with one scale for 32 rows."""
    make, nodes, name = onnx.helper.make_node, [], "weight"
    if scale is None:
        tensors = [onnx.numpy_helper.from_array(weight, "weight")]
    else:
        bits = onnx.helper.make_tensor("weight", onnx.TensorProto.INT4, weight.shape, weight.ravel().tolist())
        tensors = [bits, onnx.numpy_helper.from_array(scale, "scale")]
        nodes, name = [make("DequantizeLinear", ["weight", "scale"], ["wide"], axis=0, block_size=32)], "wide"
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [*nodes, make("MatMul", ["x", name], ["y"])],
        "matmul",
        [info("x", onnx.TensorProto.FLOAT, ["B", weight.shape[0]])],
        [info("y", onnx.TensorProto.FLOAT, ["B", weight.shape[1]])],
        tensors,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


TOKENS_NET = """
<ir_version: 10, opset_import: ["" : 21]>
denoiser (float[B,N,3] tokens, int64[B] timestep) => (float[B,N,4] epsilon)
<float[3,4] weight = {1, 0, 0, 2, 0, 1, 0, 2, 0, 0, 1, 2}> {
    number = Cast <to = 1> (timestep)
    epsilon = MatMul (tokens, weight)
}
"""


def test_tokens_have_their_channels_along_the_last_axis() -> None:
    model = onnx.parser.parse_model(TOKENS_NET).SerializeToString()
    signature = Signature("tokens", "timestep", "epsilon", channel_axis=2)
    denoiser = Denoiser(model, signature, threads=1)
    x = initial_noise(1, (2, 5, 3))

    assert denoiser.channels_out == 4
    np.testing.assert_allclose(denoiser(x, 3), np.concatenate([x, 2 * x.sum(2, keepdims=True)], axis=2), rtol=1e-5)
    with pytest.raises(InputError, match="channels along axis 3"):
        Denoiser(model, replace(signature, channel_axis=3), threads=1)
