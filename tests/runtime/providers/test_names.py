"""Engines by name: what is asked for, what is refused, and what onnxruntime's providers really run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from mezzotint.runtime.engine import Engine, threads_of
from mezzotint.runtime.errors import EngineError, EngineFallback, InputError
from mezzotint.runtime.providers import names
from mezzotint.runtime.providers.names import find_engine
from mezzotint.runtime.session import CPU_ENGINE, CPU_PROVIDER, Denoiser, OnnxRuntime, listed_providers
from mezzotint.runtime.session_network import counted
from mezzotint.runtime.signature import Signature

Build = Callable[..., bytes]
AZURE = "AzureExecutionProvider"  # in every wheel of onnxruntime for the CPU; it runs calls of a web service only


def test_the_cpu_is_the_default() -> None:
    assert find_engine() == find_engine("cpu") == CPU_ENGINE
    assert find_engine("cpu", precision="f32").precision == "f32"


@pytest.mark.parametrize(
    ("name", "options", "precision", "said"),
    [
        ("openvin", {}, None, "no engine is called 'openvin'"),
        ("openvin", {}, None, "openvino, cuda"),
        ("", {}, None, "no engine is called ''"),
        ("cpu", {"threads": "2"}, None, "the CPU provider has no option 'threads'"),
        ("cpu", {}, "bf16", "cpu cannot compute in bf16"),
        ("cpu", {}, "int8", "no precision is called 'int8'"),
        ("openvino", {}, "fp16", "no precision is called 'fp16'"),
        ("cuda", {}, "f16", "cuda cannot compute in f16"),
        ("cuda", {"use_tf32": "1"}, "f32", "use_tf32 is set by an option and by the precision"),
        ("plugin:no_such_plugin", {}, None, "pip install no-such-plugin"),
        ("plugin:../file", {}, None, "not the name of a Python module"),
        ("plugin:json", {}, None, "json is no plugin of onnxruntime"),
    ],
)
def test_what_no_engine_can_do_is_refused(
    name: str, options: Mapping[str, str], precision: str | None, said: str
) -> None:
    with pytest.raises(EngineError) as caught:
        find_engine(name, options, precision)  # type: ignore[arg-type]
    assert said in str(caught.value)


@pytest.mark.parametrize("name", sorted(names.KNOWN))
def test_a_missing_engine_names_what_to_install(name: str, denoiser_onnx: Build) -> None:
    known = names.KNOWN[name]
    if known.provider in listed_providers() or (known.plugin and find_spec(known.plugin)):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(EngineError) as caught:
        find_engine(name).open(denoiser_onnx())
    assert known.install in str(caught.value)


def test_a_precision_becomes_options_of_the_provider() -> None:
    engine = find_engine("tensorrt", {"trt_engine_cache_enable": "1"}, "bf16")
    assert isinstance(engine, OnnxRuntime)
    assert engine.settings == (("trt_bf16_enable", "1"),)
    assert engine.options == (("trt_engine_cache_enable", "1"),)
    assert find_engine(**engine.to_json()) == engine


def test_a_provider_that_runs_nothing_is_an_error(denoiser_onnx: Build, signature: Signature) -> None:
    """onnxruntime itself opens this session, and runs all of it on the CPU without a word."""
    if AZURE not in listed_providers():
        pytest.skip("this onnxruntime has no provider beside the CPU's")
    for name in (AZURE, "azure"):
        with pytest.raises(EngineError, match=f"{AZURE} takes none of the model's"):
            Denoiser(denoiser_onnx(), signature, threads=1, engine=find_engine(name))


def test_nodes_that_fall_back_are_counted_and_told(denoiser_onnx: Build) -> None:
    usage = replace(CPU_ENGINE.open(denoiser_onnx(), threads=1).usage, engine="cuda", device="CUDAExecutionProvider")
    taken = [("CUDAExecutionProvider", "Conv")] * 3 + [(CPU_PROVIDER, "Shape"), (CPU_PROVIDER, "Gather")]
    with pytest.warns(EngineFallback, match="2 of 5 nodes run on the CPU provider, and not on CUDA"):
        found = counted(usage, taken, "here")
    assert found.nodes == {"CUDAExecutionProvider": 3, CPU_PROVIDER: 2}
    assert found.fallback == {"Shape": 1, "Gather": 1}
    assert "2 of 5 nodes on the CPU provider" in found.text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert counted(usage, taken[:3], "here").fallback == {}


def test_a_plugin_that_onnxruntime_cannot_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, denoiser_onnx: Build
) -> None:
    """A package with the functions of a plugin, and a library that is none."""
    (tmp_path / "library.so").write_bytes(b"no library")
    path = str(tmp_path / "library.so")
    text = f"def get_ep_name():\n    return 'Fake'\n\ndef get_library_path():\n    return {path!r}\n"
    (tmp_path / "mezzotint_test_plugin.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    engine = find_engine("plugin:mezzotint_test_plugin")
    with pytest.raises(EngineError, match="cannot load the plugin"):
        engine.open(denoiser_onnx())
    sys.modules.pop("mezzotint_test_plugin")


@pytest.mark.parametrize(("text", "threads"), [("", None), ("3", 3), (" 2 ", 2), ("4,2", 4)])
def test_threads_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, threads: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads_of(None) == threads
    assert threads_of(1) == 1


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "999999"])
def test_a_wrong_number_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(InputError, match="threads"):
        threads_of(None)


def test_what_the_cpu_provider_uses_is_read_back(
    denoiser_onnx: Build, signature: Signature, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for threads, used in ((None, 2), (1, 1)):
        denoiser = Denoiser(denoiser_onnx(), signature, threads=threads)
        assert denoiser.usage.threads == used
        options = denoiser.session.get_session_options()
        assert options.intra_op_num_threads == used
        # It stops spinning after a call: a second engine in the process gets the cores.
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        assert denoiser.usage.to_json()["engine"] == "cpu"


def test_an_engine_is_data() -> None:
    engine: Engine = find_engine("openvino", {"B": "2", "A": "1"}, "bf16")
    assert engine.to_json() == {"name": "openvino", "options": {"A": "1", "B": "2"}, "precision": "bf16"}
    assert find_engine(**engine.to_json()) == engine
    assert hash(engine) == hash(find_engine("openvino", {"A": "1", "B": "2"}, "bf16"))
