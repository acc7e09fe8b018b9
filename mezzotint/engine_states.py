"""Which engines are installed, and which of them really run a small model on this machine.

Every installed engine is tried in a process of its own: the libraries of a broken driver may end the process.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from mezzotint.runtime.engine import ENGINE_PRECISIONS, THREADS_VARIABLE
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.providers.names import CPU_NAME, KNOWN, PLUGIN, SUFFIX, find_engine
from mezzotint.runtime.providers.openvino import OPENVINO
from mezzotint.runtime.session import CPU_PROVIDER, listed_providers

from .io.children import run_isolated

PLUGIN_PACKAGES = "onnxruntime-ep-"  # how the packages of plugins are called
OPENVINO_EXTRA = "pip install 'mezzotint[openvino]'"
# y = 2 x + 1: the last line of a trial is right only if the engine computed it.
TRIAL_MODEL = """<ir_version: 10, opset_import: ["" : 17]>
    trial (float[1,1,2,2] x) => (float[1,1,2,2] y) <float[1,1,1,1] weight = {2.0}, float[1] bias = {1.0}>
    { y = Conv (x, weight, bias) }"""


@dataclass(frozen=True)
class EngineState:
    """An engine on this machine. `why` says why it is not usable, `install` what to install for one that is missing.

    `precisions` are those of `--precision` that it accepts; `used` is what the trial used, in one line.
    """

    name: str
    installed: bool
    version: str | None
    usable: bool
    precisions: tuple[str, ...] = ()
    used: str | None = None
    why: str | None = None
    install: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "installed": self.installed,
            "version": self.version,
            "usable": self.usable,
            "precisions": list(self.precisions),
            "used": self.used,
            "why": self.why,
            "install": self.install,
        }


def engine_states() -> list[EngineState]:
    """Return the state of every engine that has a name, and of every plugin and provider that is installed."""
    return [_state(*facts) for facts in _candidates()]


def omp_threads() -> str | None:
    """Return OMP_NUM_THREADS as it is set, which is the number of threads where --threads is left out."""
    return os.environ.get(THREADS_VARIABLE) or None


def _candidates() -> Iterator[tuple[str, bool, str, str]]:
    """Yield (name, installed, distribution, what to install)."""
    listed = listed_providers()
    yield CPU_NAME, True, "onnxruntime", ""
    yield OPENVINO, find_spec("openvino") is not None, "openvino", OPENVINO_EXTRA
    for name, known in KNOWN.items():
        plugin = known.plugin is not None and find_spec(known.plugin) is not None
        package = (known.plugin or "onnxruntime").replace("_", "-")
        yield name, plugin or known.provider in listed, package, known.install
    ours = {known.provider for known in KNOWN.values()}
    for provider in listed:
        if provider != CPU_PROVIDER and provider not in ours:
            yield provider.removesuffix(SUFFIX).lower(), True, "onnxruntime", ""
    modules = {known.plugin for known in KNOWN.values()}
    names = {re.sub(r"[-_.]+", "-", str(found.metadata["Name"] or "")).lower() for found in distributions()}
    for package in sorted(name for name in names if name.startswith(PLUGIN_PACKAGES)):
        module = package.replace("-", "_")
        if module not in modules and find_spec(module) is not None:
            yield f"{PLUGIN}{module}", True, package, ""


def _state(name: str, installed: bool, package: str, install: str) -> EngineState:
    if not installed:
        return EngineState(name, False, None, False, why="not installed", install=install)
    done = run_isolated(__name__, json.dumps({"name": name, "model": _trial_model().hex()}))
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        errors = done.stderr.strip().splitlines()
        why = f"its process ended with {done.returncode}" + (f": {errors[-1]}" if errors else "")
        return EngineState(name, True, _package_version(package), False, why=why)
    return EngineState(name, True, _package_version(package), **json.loads(lines[-1]))


def _trial_model() -> bytes:
    from onnx import parser

    return bytes(parser.parse_model(TRIAL_MODEL).SerializeToString())


def _package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def try_engine(name: str, model: bytes) -> dict[str, Any]:
    """Open and run the trial model on an engine, in each precision; return fields of `EngineState`."""
    precisions: list[str] = []
    used, why = None, None
    x, y = np.array([[[[0, 1], [2, -3]]]], np.float32), np.empty((1, 1, 2, 2), np.float32)
    for precision in ENGINE_PRECISIONS:
        try:
            network = find_engine(name, precision=precision).open(model, threads=1)  # type: ignore[arg-type]
            network.run({"x": x}, "y", y)
        except MezzotintError as error:
            why = why or error.what
            continue
        if not np.array_equal(y, 2 * x + 1):
            why = why or f"it computed {y.ravel().tolist()} instead of {(2 * x + 1).ravel().tolist()}"
            continue
        used = used or network.usage.text()
        precisions.append(precision)
    return {"usable": bool(precisions), "precisions": precisions, "used": used, "why": None if precisions else why}


def main(task: str) -> None:
    """Try one engine, and print the fields as JSON."""
    facts = json.loads(task)
    print("\n" + json.dumps(try_engine(facts["name"], bytes.fromhex(facts["model"]))))
