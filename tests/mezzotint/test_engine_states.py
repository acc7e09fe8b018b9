"""What `mezzotint doctor` says of the engines: installed is one thing, and running a model another."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint import engine_states
from mezzotint.engine_states import OPENVINO_EXTRA, EngineState
from mezzotint.runtime.providers.names import KNOWN, find_engine
from mezzotint.runtime.session import listed_providers

MODEL = engine_states._trial_model()


def test_the_cpu_runs_the_trial_in_f32_only() -> None:
    found = engine_states.try_engine("cpu", MODEL)
    assert (found["usable"], found["precisions"], found["why"]) == (True, ["f32"], None)
    assert found["used"].startswith("cpu (onnxruntime ")


def test_openvino_runs_the_trial() -> None:
    pytest.importorskip("openvino")
    found = engine_states.try_engine("openvino", MODEL)
    assert found["usable"] and found["precisions"][0] == "f32"
    assert found["used"].startswith("openvino (openvino 20")


def test_an_engine_that_takes_nothing_is_not_usable() -> None:
    if "AzureExecutionProvider" not in listed_providers():
        pytest.skip("this onnxruntime has no provider beside the CPU's")
    found = engine_states.try_engine("azure", MODEL)
    assert not found["usable"] and "takes none" in found["why"]


def test_an_engine_that_computes_wrong_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def open(self, model: bytes, *, threads: int) -> Any:
            network = find_engine("cpu").open(model, threads=threads)
            run = network.run

            def wrong(feeds: Any, output: str, out: Any) -> None:
                run(feeds, output, out)
                out *= np.float32(1.01)

            network.run = wrong  # type: ignore[method-assign]
            return network

    monkeypatch.setattr(engine_states, "find_engine", lambda name, precision: Wrong())
    found = engine_states.try_engine("cpu", MODEL)
    assert not found["usable"] and "it computed" in found["why"]


def test_every_engine_has_a_state_and_a_missing_one_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial runs in a process of its own, which a broken library may end."""
    ended = subprocess.CompletedProcess([], -11, stdout="", stderr="a driver said this\n")
    monkeypatch.setattr(engine_states, "run_isolated", lambda module, task: ended)
    monkeypatch.setattr(engine_states, "find_spec", lambda name: None)
    found = {state.name: state for state in engine_states.engine_states()}
    assert found.keys() >= {"cpu", "openvino", *KNOWN}
    assert found["openvino"] == EngineState("openvino", False, None, False, why="not installed", install=OPENVINO_EXTRA)
    for name, known in KNOWN.items():
        if known.provider not in listed_providers():
            assert (found[name].installed, found[name].install) == (False, known.install)
    assert found["cpu"].installed and not found["cpu"].usable
    assert found["cpu"].why == "its process ended with -11: a driver said this"


def test_plugins_that_are_installed_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime_ep_fake").mkdir()
    (tmp_path / "onnxruntime_ep_fake" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "onnxruntime_ep_fake-1.5.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: onnxruntime_ep-fake\nVersion: 1.5\n"
    (tmp_path / "onnxruntime_ep_fake-1.5.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = next(facts for facts in engine_states._candidates() if facts[0].startswith("plugin:onnxruntime_ep_fake"))
    state = engine_states._state(*facts)  # in a real process
    assert (state.installed, state.version, state.usable) == (True, "1.5", False)
    assert state.why is not None and "is no plugin of onnxruntime" in state.why
