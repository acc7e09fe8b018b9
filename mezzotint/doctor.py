"""`mezzotint doctor`: versions, CPU features, and the expected speed of integer kernels on this machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from .io.processor import processor_features, usable_cores

PACKAGES = ("onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy", "safetensors", "openvino", "torch", "diffusers")


def examine() -> dict[str, Any]:
    """Return the report as plain data."""
    versions = {name: _version(name) for name in PACKAGES}
    features = processor_features()
    tested = versions.get("onnxruntime") is not None and untested_onnxruntime() is None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "onnxruntime_tested": tested,
        "cpu_features": features,
        "cores": psutil.cpu_count(logical=False),
        "threads": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "can_compile_diffusers": versions["torch"] is not None and versions["diffusers"] is not None,
        "expect": _expectation(features),
    }


def untested_onnxruntime() -> str | None:
    """Return a warning if Mezzotint was not tested with the running onnxruntime, else None."""
    from mezzotint.runtime.session import TESTED_ONNXRUNTIME, untested_version

    running = untested_version()
    if running is None:
        return None
    return (
        f"the fusion rules of onnxruntime {running} were not tested; tested were {', '.join(TESTED_ONNXRUNTIME)}. "
        "`mezzotint inspect BUNDLE` lists the layers that run on integers"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _expectation(features: list[str] | None) -> str:
    if features is None:
        return "the CPU's features are not listed by this system; run `mezzotint demo` to see the speed"
    if "amx_int8" in features or "avx512_vnni" in features or "avx_vnni" in features:
        return "8-bit dot products in hardware: integer kernels are exact and much faster than float32"
    if "asimddp" in features:
        return "8-bit dot products in hardware (Arm): integer kernels are exact and faster than float32"
    if "avx2" in features:
        return (
            "no VNNI: pairs of 8-bit products saturate at 16 bits in onnxruntime's kernels. Compile with 7-bit weights "
            "(--set choose_scales.weight_bits=7) to stay exact; expect little speed"
        )
    return "no vector instructions for 8-bit products: expect smaller files, not speed"
