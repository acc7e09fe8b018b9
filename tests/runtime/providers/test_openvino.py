"""OpenVINO as an engine of a denoiser: results, shapes, threads, precision, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest

from mezzotint.runtime.bundle.bundle import open_bundle
from mezzotint.runtime.compare import psnr_db
from mezzotint.runtime.errors import EngineError, InputError
from mezzotint.runtime.providers import openvino as adapter
from mezzotint.runtime.providers.integer_form import foreign_operation
from mezzotint.runtime.providers.names import find_engine
from mezzotint.runtime.providers.openvino import SHAPES_KEPT, OpenVinoNetwork
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Signature
from tests.helpers.models import Compiled
from tests.runtime.test_session import check_output

ov = pytest.importorskip("openvino")

Build = Callable[..., bytes]
OPENVINO = find_engine("openvino")
CAPABILITIES = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def network_of(denoiser: Denoiser) -> OpenVinoNetwork:
    return cast(OpenVinoNetwork, denoiser.network)


def decibels(want: Images, found: Images) -> float:
    return float(10 * np.log10((want**2).sum() / ((want - found) ** 2).sum()))


def one_node(op: str, name: str = "conv", domain: str = "") -> bytes:
    """A graph of one node; it need not be valid, because only the spelling of the node is looked at."""
    node = onnx.helper.make_node(op, ["sample"], ["epsilon"], name=name, domain=domain)
    one, two = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["B", 8]) for n in ("sample", "epsilon"))
    opsets = [onnx.helper.make_opsetid("", 21), *([onnx.helper.make_opsetid(domain, 1)] if domain else [])]
    graph = onnx.helper.make_graph([node], "g", [one], [two])
    data: bytes = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return data


@pytest.mark.parametrize("declared", ["int64[B]", "int64", "float[B]", "int32[B]"])
def test_it_computes_the_graph_however_the_timestep_is_declared(
    denoiser_onnx: Build, signature: Signature, declared: str
) -> None:
    denoiser = Denoiser(denoiser_onnx(declared), signature, threads=1, engine=OPENVINO)
    x = initial_noise(1, (2, 1, 8, 8))
    given = np.empty_like(x)
    found = denoiser(x, 250, out=given)
    assert found is given
    check_output(found, x, 250)
    check_output(denoiser(x[:1], 900), x[:1], 900)
    check_output(given, x, 250)  # the second call left the caller's array alone
    with pytest.raises(AssertionError):
        check_output(found * np.float32(1.01), x, 250)


def test_conditions_and_their_refusals(denoiser_onnx: Build, signature: Signature) -> None:
    data, both = denoiser_onnx(context="float[B,4]"), replace(signature, conditions=("context",))
    mine, cpu = Denoiser(data, both, threads=1, engine=OPENVINO), Denoiser(data, both, threads=1)
    x, context = initial_noise(1, (2, 1, 8, 8)), np.array([[1, 2, 3, 4], [0, 0, 0, 8]], np.float32)
    np.testing.assert_allclose(mine(x, 5, context=context), cpu(x, 5, context=context), rtol=0, atol=2e-6)
    for wrong in (context[:1], context[:, :3], context.astype(np.float64)):
        with pytest.raises(InputError, match="input 'context' is"):
            mine(x, 5, context=wrong)


def test_a_bundle_runs_on_integer_kernels(hand: Compiled) -> None:
    bundle = hand.bundle.on(OPENVINO)
    assert bundle.on(OPENVINO) is bundle and bundle.denoiser(1) is bundle.denoiser(1)
    x, t = initial_noise(1, (2, *bundle.sample_shape)), bundle.deployment.timesteps[1]
    assert decibels(hand.bundle.denoiser(1)(x, t), bundle.denoiser(1)(x, t)) > 30
    layers = network_of(bundle.denoiser(1)).layers(network_of(bundle.denoiser(1)).compiled_shapes[-1])
    convolutions = [layer for layer in layers if layer["layerType"] == "Convolution"]
    in_float = {layer["name"].partition("/")[0] for layer in convolutions if "I8" not in layer["primitiveType"]}
    assert in_float == set(bundle.manifest.islands) and len(convolutions) > len(in_float)


def test_images_are_near_those_of_the_cpu_and_repeat(hand: Compiled) -> None:
    bundle = hand.bundle.on(OPENVINO)
    cpu, first, again = (b.sample(3, seed=1, batch=2, threads=1) for b in (hand.bundle, bundle, bundle))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(cpu, first)  # it is another engine
    assert psnr_db(np.clip(cpu, -1, 1), np.clip(first, -1, 1), peak=2.0).min() > 30


def test_the_noise_correction_is_applied(make_bundle: Callable[..., tuple[Path, object]]) -> None:
    bundle = open_bundle(make_bundle(correction=True)[0])
    mine = bundle.on(OPENVINO)
    found = mine.sample(2, seed=1, threads=1)
    np.testing.assert_allclose(found, bundle.sample(2, seed=1, threads=1), rtol=0, atol=1e-4)
    assert np.abs(found - mine.sample(2, seed=1, threads=1, correction=False)).max() > 1e-2


def test_the_last_shapes_are_kept(hand: Compiled) -> None:
    denoiser = Denoiser(hand.bundle.model_path, hand.bundle.signature, threads=1, engine=OPENVINO)
    cpu, t = hand.bundle.denoiser(1), hand.bundle.deployment.timesteps[0]
    for batch in (1, 3, 2, 1):
        x = initial_noise(batch, (batch, *hand.bundle.sample_shape))
        assert decibels(cpu(x, t), denoiser(x, t)) > 30
        shapes = network_of(denoiser).compiled_shapes
        assert len(shapes) <= SHAPES_KEPT and x.shape in shapes[-1].values()


def test_threads_may_share_a_network(denoiser_onnx: Build, signature: Signature) -> None:
    denoiser = Denoiser(denoiser_onnx(), signature, threads=1, engine=OPENVINO)
    inputs = [initial_noise(i, (1 + i % 3, 1, 8, 8)) for i in range(6)]
    want = [denoiser(x, 100) for x in inputs]
    found: list[npt.NDArray[np.float32] | None] = [None] * len(inputs)

    def call(i: int) -> None:
        for _ in range(5):
            found[i] = denoiser(inputs[i], 100)

    workers = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(want, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_it_uses_is_read_back(denoiser_onnx: Build, signature: Signature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    engine = find_engine("openvino", {"ENABLE_HYPER_THREADING": "NO"})
    for threads, used in ((1, 1), (None, 2)):
        usage = Denoiser(denoiser_onnx(), signature, threads=threads, engine=engine).usage
        assert (usage.engine, usage.threads, usage.precision) == ("openvino", used, "f32")
        assert usage.options["ENABLE_HYPER_THREADING"] == "False"
        assert usage.options["ENABLE_CPU_PINNING"] == "False"  # its threads are not bound to cores of another engine
        assert usage.options["NUM_STREAMS"] == "1"
        assert usage.library.startswith("openvino 20") and usage.device.startswith("CPU")


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_a_precision_is_used_or_refused(hand: Compiled, precision: str) -> None:
    """OpenVINO replaces a precision that the processor lacks by another one, without a word."""
    bundle = hand.bundle.on(find_engine("openvino", precision=precision))  # type: ignore[arg-type]
    if {"bf16": "BF16", "f16": "FP16"}[precision] not in CAPABILITIES:
        with pytest.raises(EngineError, match=f"instead of {precision}"):
            bundle.denoiser(1)
        return
    assert bundle.usage(1).precision == precision
    x, t = initial_noise(1, (2, *bundle.sample_shape)), bundle.deployment.timesteps[1]
    exact = hand.bundle.on(OPENVINO).denoiser(1)(x, t)
    assert 20 < decibels(exact, bundle.denoiser(1)(x, t)) < 80


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"NO_SUCH": "1"}, "NO_SUCH"),
        ({"NUM_STREAMS": "many"}, "refuses the options"),
        ({"device": "TOASTER"}, "device TOASTER"),
        ({"INFERENCE_NUM_THREADS": "2"}, "set by an option and by the threads"),
        ({"INFERENCE_PRECISION_HINT": "bf16"}, "set by an option and by the precision"),
    ],
)
def test_wrong_options(denoiser_onnx: Build, options: dict[str, str], said: str) -> None:
    with pytest.raises(EngineError) as caught:
        find_engine("openvino", options).open(denoiser_onnx(), threads=1)
    assert said in str(caught.value) and "Exception from" not in str(caught.value)


def test_the_integer_form_of_onnxruntime_is_refused_with_the_fix(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    for data, operation in (
        (one_node("QLinearConv"), "QLinearConv"),
        (one_node("MatMulIntegerToFloat", domain="com.microsoft"), "com.microsoft"),
    ):
        file.write_bytes(data)
        for model in (data, file):
            with pytest.raises(EngineError, match=operation) as caught:
                OPENVINO.open(model, threads=1)
            assert "--target openvino" in str(caught.value)


def test_only_operations_count_as_the_integer_form(hand: Compiled, tmp_path: Path) -> None:
    """A node may be called QLinearConv, and a text may name a domain."""
    assert foreign_operation(one_node("Relu", name="QLinearConv")) is None
    assert foreign_operation(one_node("QLinearAdd", domain="com.microsoft")) == "QLinearAdd"
    assert foreign_operation(hand.bundle.model_path) is None
    assert foreign_operation(tmp_path / "missing.onnx") is None


def test_models_that_cannot_be_opened(tmp_path: Path) -> None:
    damaged = tmp_path / "model.onnx"
    damaged.write_bytes(b"junk" * 40)
    for model in (damaged, tmp_path / "missing.onnx", b"junk"):
        with pytest.raises(InputError, match="OpenVINO cannot open the model") as caught:
            OPENVINO.open(model, threads=1)
        assert "Exception from" not in str(caught.value)


def test_what_openvino_finds_in_the_call_is_an_input_error(signature: Signature) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[B,1,H,W] sample, int64[B] timestep) => (float[B,1,8,8] epsilon) <int64[4] shape = {-1, 1, 8, 8}>
        { shaped = Reshape (sample, shape) number = CastLike (timestep, sample) one = ReduceMean <keepdims = 0> (number)
          epsilon = Mul (shaped, one) }"""
    denoiser = Denoiser(onnx.parser.parse_model(text).SerializeToString(), signature, threads=1, engine=OPENVINO)
    with pytest.raises(InputError, match="OpenVINO refused the call") as caught:
        denoiser(np.zeros((1, 1, 5, 5), np.float32), 5)
    assert caught.value.where == "x float32 [1, 1, 5, 5], timestep 5"


def test_without_openvino_the_error_names_the_extra(denoiser_onnx: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="OpenVINO is not installed") as caught:
        OPENVINO.open(denoiser_onnx())
    assert "mezzotint[openvino]" in str(caught.value)


def test_a_version_that_computes_wrong_is_refused(denoiser_onnx: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov, "get_version", lambda: "2026.2.1-1-releases/2026/2")
    with pytest.raises(EngineError, match=r"OpenVINO 2026.2.1 is too old: 2026.3"):
        OPENVINO.open(denoiser_onnx())


def test_times_of_nodes(denoiser_onnx: Build, signature: Signature, tmp_path: Path) -> None:
    timed = Denoiser(denoiser_onnx(), signature, threads=1, engine=find_engine("openvino", {"PERF_COUNT": "YES"}))
    with pytest.raises(EngineError, match="no times of nodes"):
        network_of(timed).node_times()
    timed(initial_noise(1, (2, 1, 8, 8)), 5)
    nodes = network_of(timed).node_times()
    assert "Convolution" in {node.kind for node in nodes} and sum(node.seconds for node in nodes) > 0
    with pytest.raises(EngineError, match="profile"):
        OPENVINO.open(denoiser_onnx(), profile=tmp_path / "trace")
    with pytest.raises(EngineError, match="no session of onnxruntime"):
        _ = timed.session
