"""The processor of this machine: its name, and the features that decide which kernels an engine picks."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "avx_vnni_int8", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16"),
)
_CPUINFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """Return the processor in words, as far as the system names it."""
    words = platform.processor() or platform.machine()
    lines = _lines() or []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), words)


def processor_features() -> list[str] | None:
    """Return those of CPU_FEATURES that the processor has; None where the system does not list them."""
    lines = _lines()
    if lines is None:
        return None
    flags = next((line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))), None)
    return None if flags is None else [name for name in CPU_FEATURES if name in flags.split()]


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lines() -> list[str] | None:
    try:
        return _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
