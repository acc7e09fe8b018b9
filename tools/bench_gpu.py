"""The GPU part of tools/bench.py: parity with the CPU, nodes by provider, speed and memory, for three configurations.

    python tools/bench.py gpu                                       all usable providers, all three models
    python tools/bench.py gpu --models digits --providers cuda

Each model is measured as a float file and as the bundle of `--target tensorrt`, on each provider:

* parity: the same file on the CPU provider and on the GPU, at three timesteps of the deployment;
* nodes: how many each provider took, and which operations fell back to the CPU;
* speed: the float file and the bundle in turns on the GPU, and each beside the CPU provider;
* memory: what the process holds on the GPU, from nvidia-smi, and the peak of the host.

Exit code 2, at once, where no GPU provider is usable. This has never run on a GPU: none was there when it was written.
What it does on a machine without one, and on the CPU provider in place of a GPU, is tested (tests/tools/test_bench.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.api import compile_model
from mezzotint.compiler.core.memory import PeakMemory
from mezzotint.progress import shown
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import ratio_db
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.latency import in_turns, ratio
from mezzotint.runtime.providers.names import find_engine
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Predict
from tools.bench_models import CIFAR10, SD15, random_model

GPU_PROVIDERS = ("cuda", "tensorrt", "nv_tensorrt_rtx")
"""Engines by the names of `--provider`. They compute in f32: TF32 would hide what a file loses."""
MODELS_OF_GPU = ("digits", "cifar10", "sd15")
ALIKE = 999.0  # decibels that stand for no difference; minus that for values that are not finite
FLOAT_PARITY, INTEGER_PARITY = 40.0, 20.0
"""Decibels. Rounding at a tie may move an integer by one step, and the layers behind it further."""


_INSTALL = (
    "on a machine with an NVIDIA GPU: pip install onnxruntime-gpu (in place of onnxruntime), with tensorrt for the "
    "provider of that name, or the plugin onnxruntime-ep-nv-tensorrt-rtx"
)


def usable(names: Sequence[str]) -> list[str]:
    """Return the providers, of these, that the installed onnxruntime has and that open a session on this machine.

    Raises InputError where there is none, with what is missing for each.
    """
    found, missing = [], []
    for name in names:
        if name not in GPU_PROVIDERS:
            raise InputError(f"no GPU provider is called {name!r}", hint=f"use some of {', '.join(GPU_PROVIDERS)}")
        try:
            find_engine(name).open(_probe())
            found.append(name)
        except InputError as error:
            missing.append(f"{name}: {error.what}")
    if not found:
        raise InputError("no GPU provider is usable on this machine", where="; ".join(missing), hint=_INSTALL)
    return found


def _probe() -> bytes:
    """A model of one node."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1] x) => (float[1] y) { y = Exp (x) }'
    )
    return bytes(ir.to_proto(model).SerializeToString())


def gpu_memory_mb() -> float | None:
    """Return what this process holds on its GPUs, in megabytes (1e6 bytes), or None where nvidia-smi does not tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return None if answer.returncode else process_memory(answer.stdout, os.getpid())


def process_memory(table: str, process: int) -> float | None:
    """Return the megabytes of a process in nvidia-smi's rows `pid, MiB`, or None if it is in none."""
    rows = [line.split(",") for line in table.splitlines() if line.count(",") == 1]
    used = [float(mib) * 1.048576 for pid, mib in rows if pid.strip() == str(process) and mib.strip().isdigit()]
    return sum(used) if used else None


def compiled(name: str, folder: Path, threads: int | None) -> tuple[Bundle, Path, int]:
    """Return (bundle in TensorRT's form, its float file, batch size) of one of MODELS_OF_GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"target": "tensorrt", "threads": threads, "export": folder / "float.onnx"}
    few: dict[str, Any] = {"steps": 5, "calibration_samples": 4, "calibration_batch": 4}
    with shown() as progress:
        options["progress"] = progress
        if name == "digits":
            return compile_model("digits", folder / "bundle", **options), folder / "float.onnx", 16
        if name == "cifar10":
            model = random_model("UNet2DModel", CIFAR10)()
            bundle = compile_model(model, folder / "bundle", scheduler="ddpm-linear", **few, **options)
            return bundle, folder / "float.onnx", 4
        random_model("UNet2DConditionModel", SD15)().save_pretrained(folder / "source")
        few |= {"steps": 2, "calibration_samples": 2, "calibration_batch": 2}
        conditions: dict[str, Any] = {"scheduler": "sd", "size": (64, 64), "conditions": "random"}
        bundle = compile_model(folder / "source", folder / "bundle", **few, **conditions, **options)
        return bundle, folder / "float.onnx", 2


def random_conditions(bundle: Bundle, batch: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return seeded prompts `[batch, 77, 768]` for the Stable Diffusion configuration, and nothing for the others."""
    rng = np.random.default_rng(0)
    names = bundle.signature.conditions
    return {name: rng.standard_normal((batch, 77, 768)).astype(np.float32) for name in names}


def measure(
    bundle: Bundle,
    float_model: Path,
    provider: str,
    batch: int,
    *,
    threads: int | None = None,
    conditions: Mapping[str, npt.NDArray[Any]] | None = None,
    repeats: int = 15,
) -> dict[str, Any]:
    """Return parity, nodes, speed and memory of a bundle and its float file on one provider, as plain data."""
    x = samplers.initial_noise(0, (batch, *bundle.sample_shape))
    times = bundle.deployment.timesteps
    steps = [times[0], times[len(times) // 2], times[-1]]
    files = {"float": float_model, "integer": bundle.model_path}
    result: dict[str, Any] = {"provider": provider, "batch": batch}
    rows = {name: value[:batch] for name, value in (conditions or {}).items()}
    called: dict[tuple[str, str], Predict] = {}
    with PeakMemory() as host:
        for form, file in files.items():
            exact = partial(Denoiser(file, bundle.signature, threads=threads), **rows)
            exact(x, steps[1])
            before = gpu_memory_mb()
            net = Denoiser(file, bundle.signature, threads=threads, engine=find_engine(provider))
            mine = partial(net, **rows)
            mine(x, steps[1])
            after = gpu_memory_mb()
            called[form, "cpu"], called[form, provider] = exact, mine
            result[f"{form}_gpu_mb"] = None if after is None else round(after - (before or 0.0), 1)
            result[f"{form}_parity_db"] = [round(parity_db(exact(x, t), mine(x, t)), 1) for t in steps]
            result[f"{form}_nodes"], result[f"{form}_fallback"] = dict(net.usage.nodes), dict(net.usage.fallback)
            result[f"{form}_engine"] = net.usage.text()
        order = [called[form, name] for form in files for name in ("cpu", provider)]
        cpu_float, gpu_float, _, gpu_integer = timed = in_turns(order, x, steps[1], repeats=repeats)
    result["call_ms"] = [round(latency.median * 1e3, 2) for latency in timed]
    result["call_order"] = [f"{form} on {name}" for form in files for name in ("cpu", provider)]
    result["gpu_float_over_cpu_float"] = ratio(cpu_float, gpu_float).to_json()
    result["gpu_integer_over_gpu_float"] = ratio(gpu_float, gpu_integer).to_json()
    result["host_peak_mb"] = round(host.peak_mb, 1)
    return result


def parity_db(reference: Images, other: Images) -> float:
    """Return the power of a prediction over that of its difference from another, in decibels, within +-ALIKE."""
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return -ALIKE
    exact = reference.astype(np.float64)
    return float(np.clip(ratio_db(float(np.sum(exact**2)), float(np.sum((other - exact) ** 2))), -ALIKE, ALIKE))


def report(result: Mapping[str, Any], add: Any) -> None:
    """Print a result and add its bars: `add(what, value, bar, good)`."""
    print(json.dumps(result), flush=True)
    for form, bar in (("float", FLOAT_PARITY), ("integer", INTEGER_PARITY)):
        worst = min(result[f"{form}_parity_db"])
        add(f"{form} on {result['provider']} against the CPU, dB", worst, f">= {bar}", worst >= bar)
        lost = sum(result[f"{form}_fallback"].values())
        add(f"{form}: nodes that {result['provider']} left to the CPU", lost, "0", lost == 0)
    speed = result["gpu_integer_over_gpu_float"]["value"]
    add(f"integer over float on {result['provider']}", speed, ">= 1", speed >= 1)
