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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from mezzotint.api import compile_model
from mezzotint.compiler.core.execute import feeds
from mezzotint.compiler.core.memory import PeakMemory
from mezzotint.progress import shown
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import ratio_db
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.latency import in_turns, ratio
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.signature import Images, Signature, Timestep
from tools.bench_models import CIFAR10, SD15, random_model

GPU_PROVIDERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
    "tensorrt": ("TensorrtExecutionProvider", {}),
    "nv_tensorrt_rtx": ("NvTensorRTRTXExecutionProvider", {}),
}
"""Names, as `--provider` takes them, of onnxruntime's providers, with options. TF32 would hide what a file loses."""
CPU = "CPUExecutionProvider"
PROVIDERS: Mapping[str, tuple[str, Mapping[str, str]]] = {"cpu": (CPU, {}), **GPU_PROVIDERS}
MODELS_OF_GPU = ("digits", "cifar10", "sd15")
ALIKE = 999.0  # decibels that stand for no difference; minus that for values that are not finite
FLOAT_PARITY, INTEGER_PARITY = 40.0, 20.0
"""Decibels. Rounding at a tie may move an integer by one step, and the layers behind it further."""


@dataclass(frozen=True)
class Taken:
    """Nodes of each provider, and the operations that did not run on the one asked for."""

    nodes: Mapping[str, int]
    fallback: Mapping[str, int]


class ProviderNetwork:
    """A file on one provider, called as a denoiser with fixed conditions."""

    def __init__(
        self,
        model: Path,
        signature: Signature,
        name: str,
        *,
        threads: int | None = None,
        conditions: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        provider, options = PROVIDERS[name]
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads or 0
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers = [CPU] if provider == CPU else [(provider, dict(options)), CPU]
        self._session = ort.InferenceSession(str(model), settings, providers=providers, enable_fallback=0)
        if provider not in self._session.get_providers():
            raise InputError(f"onnxruntime opened the model without {provider}", where=str(model), hint=_INSTALL)
        self._provider, self._signature = provider, signature
        self._conditions = dict(conditions or {})
        self._inputs = {str(value.name): value for value in ir.load(model).graph.inputs}

    def __call__(self, x: Images, t: Timestep) -> Images:
        rows = feeds(self._inputs, self._signature, x, t, {n: rows[: len(x)] for n, rows in self._conditions.items()})
        return np.asarray(self._session.run([self._signature.output], rows)[0], np.float32)

    def taken(self) -> Taken:
        """Return which provider took which nodes."""
        pairs = [
            (part.ep_name, node.op_type)
            for part in self._session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
        fallback = Counter(operation for provider, operation in pairs if provider != self._provider)
        return Taken(dict(Counter(provider for provider, _ in pairs)), dict(fallback))


_INSTALL = (
    "on a machine with an NVIDIA GPU: pip install onnxruntime-gpu (in place of onnxruntime), with tensorrt for the "
    "provider of that name"
)


def usable(names: Sequence[str]) -> list[str]:
    """Return the providers, of these, that the installed onnxruntime has and that open a session on this machine.

    Raises InputError where there is none, with what is missing for each.
    """
    found, missing = [], []
    for name in names:
        if name not in GPU_PROVIDERS:
            raise InputError(f"no GPU provider is called {name!r}", hint=f"use some of {', '.join(GPU_PROVIDERS)}")
        provider, options = GPU_PROVIDERS[name]
        if provider not in ort.get_available_providers():
            missing.append(f"{name}: onnxruntime {ort.__version__} has no {provider}")
            continue
        try:
            session = ort.InferenceSession(_probe(), providers=[(provider, dict(options)), CPU], enable_fallback=0)
            opened = provider in session.get_providers()
            reason = "its libraries or its device cannot be used"
        except Exception as error:  # what a provider without its libraries raises is up to it
            opened, reason = False, " ".join(str(error).split())[:200]
        if opened:
            found.append(name)
        else:
            missing.append(f"{name}: {reason}")
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
    opened: dict[tuple[str, str], ProviderNetwork] = {}
    with PeakMemory() as host:
        for form, file in files.items():
            for name in ("cpu", provider):
                before = gpu_memory_mb()
                net = ProviderNetwork(file, bundle.signature, name, threads=threads, conditions=conditions)
                net(x, steps[1])
                opened[form, name] = net
                after = gpu_memory_mb()
                if name == provider:
                    result[f"{form}_gpu_mb"] = None if after is None else round(after - (before or 0.0), 1)
            mine = opened[form, provider]
            result[f"{form}_parity_db"] = [round(parity_db(opened[form, "cpu"](x, t), mine(x, t)), 1) for t in steps]
            taken = mine.taken()
            result[f"{form}_nodes"], result[f"{form}_fallback"] = taken.nodes, taken.fallback
        order = [opened[form, name] for form in files for name in ("cpu", provider)]
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
