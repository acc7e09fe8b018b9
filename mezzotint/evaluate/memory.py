"""The memory that opening a model and calling it once adds to a fresh process.

In one process, the figure of the second model would include what the first left behind and all other loaded data. The
new process loads its libraries, makes its inputs, notes its resident memory, opens the model, and makes one call at the
deployment's middle timestep. It prints the peak (the system's high-water mark of that process) and the memory before
the model was opened, in bytes. A bundle of several precisions has several models. The difference is reported: the
model, onnxruntime's prepacked weights and its activations. A memory-mapped file counts as far as it was read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.compiler.core.memory import PeakMemory
from mezzotint.runtime.bundle.bundle import Bundle, open_bundle
from mezzotint.runtime.engine import Engine
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.providers.names import find_engine
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.session import CPU_ENGINE, Denoiser
from mezzotint.runtime.streams import FIXED

from ..bench.pairs import middle_timestep
from ..io.children import run_isolated


@dataclass(frozen=True)
class Memory:
    """Bytes of resident memory: the peak, and the memory before the model was opened."""

    peak: int
    before: int

    @property
    def added(self) -> int:
        return self.peak - self.before

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "added": self.added}


def memory_of_one_call(
    bundle: Bundle,
    models: Sequence[Path],
    batch: int,
    *,
    threads: int | None = None,
    conditions: Conditions | None = None,
    engine: Engine = CPU_ENGINE,
) -> Memory:
    """Measure one call of each ONNX file with the bundle's inputs on an engine, in a new process.

    Conditions are zeros with the types and shapes of `conditions`. Raises InputError where the process fails.
    """
    shapes = {name: [array.dtype.str, [batch, *array.shape[1:]]] for name, array in (conditions or {}).items()}
    task: dict[str, Any] = {
        "bundle": str(bundle.path.absolute()),
        "models": [str(model.absolute()) for model in models],
    }
    task |= {"batch": batch, "threads": threads, "conditions": shapes, "engine": engine.to_json()}
    done = run_isolated(__name__, json.dumps(task))
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        what = lines[-1] if lines else f"it ended with {done.returncode}"
        raise InputError(
            f"the memory of a call cannot be measured: {what}", where=str(models[0]), hint="try --no-speed"
        )
    return Memory(**json.loads(done.stdout))


def _measure(task: dict[str, Any]) -> Memory:
    bundle = open_bundle(task["bundle"], verify=False)
    x, t = initial_noise(FIXED, (task["batch"], *bundle.sample_shape)), middle_timestep(bundle)
    conditions = {name: np.zeros(shape, dtype) for name, (dtype, shape) in task["conditions"].items()}
    with PeakMemory() as watch:
        before = int(watch.peak_mb * 1e6)
        engine = find_engine(**task["engine"])
        nets = [Denoiser(model, bundle.signature, threads=task["threads"], engine=engine) for model in task["models"]]
        for net in nets:
            net(x, t, **conditions)
    return Memory(max(_high_water(), int(watch.peak_mb * 1e6)), before)


def _high_water() -> int:
    """Return the process's high-water mark where the system reports it, else 0.

    Not from getrusage: on Linux a new process begins with the mark of the process that started it.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def main(task: str) -> None:
    """Measure and print as JSON what `memory_of_one_call` asks a new process for."""
    print(json.dumps(asdict(_measure(json.loads(task)))))
