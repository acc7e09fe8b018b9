"""The cost of a call of a bundle and of its float model: time, memory, bytes, kernels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.latency import Latency, Ratio, in_turns
from mezzotint.runtime.sampling.condition_network import call_conditions
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.session import CPU_ENGINE, Denoiser
from mezzotint.runtime.signature import Predict
from mezzotint.runtime.streams import FIXED

from ..bench.pairs import folder_bytes, middle_timestep
from ..text.report import model_bytes
from .memory import memory_of_one_call

REPEATS, ROUNDS = 7, 2


def size(bundle: Bundle, reference: Path) -> dict[str, Any]:
    """Return the bytes of the ONNX files with their weights, and the ratio bundle / float."""
    mine, before = model_bytes(bundle), folder_bytes(reference)
    return {"bytes": mine, "float_bytes": before, "share": round(mine / before, 6)}


def kernels(bundle: Bundle) -> dict[str, Any]:
    """Return the numbers of integer and float kernels, and the islands with their reasons, from the manifest.

    `counted` says that these are not the target's kernels, and is left out where they are.
    """
    manifest, counts = bundle.manifest, bundle.manifest.kernels
    found = {"integer": counts.integer, "float": counts.floating, "islands": dict(manifest.islands)}
    return {**found, "counted": manifest.measured_in} if manifest.measured_in else found


def speed(
    bundle: Bundle,
    exact: Denoiser,
    batch: int,
    threads: int | None,
    conditions: Conditions,
    *,
    repeats: int = REPEATS,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Return the milliseconds of one call of both networks at the middle timestep, and their ratio.

    Calls are measured in blocks, forwards and backwards over the networks. For a bundle of several precisions the time
    is the mean over the deployment's calls. Guidance, which doubles both times, is not applied.
    """
    rows = first_rows(bundle, batch, conditions)

    def on_rows(net: Denoiser) -> Predict:
        return lambda x, t: net(x, t, **rows)

    counted = Counter(bundle.denoisers(threads=threads))
    x, t = initial_noise(FIXED, (batch, *bundle.sample_shape)), middle_timestep(bundle)
    slow, *latencies = in_turns([on_rows(net) for net in (exact, *counted)], x, t, repeats=repeats, rounds=rounds)
    mine, blocks = _mean(latencies, list(counted.values()))
    each = [slow.median / mine, *(float(e / b) for e, b in zip(slow.blocks, blocks, strict=True))]
    return {
        "batch": batch,
        "threads": threads,
        "call_ms": round(mine * 1e3, 4),
        "float_call_ms": round(slow.median * 1e3, 4),
        "ratio": Ratio(each[0], min(each), max(each)).to_json(),
        "calls": len(slow.seconds),
        "blocks": len(slow.blocks),
    }


def first_rows(bundle: Bundle, batch: int, conditions: Conditions) -> Conditions:
    """Return the conditions of one call at the middle timestep, `[batch, ...]`: the first row of each, and what a
    condition network computes for them."""
    rows = {name: np.repeat(array[:1], batch, axis=0) for name, array in conditions.items()}
    x = initial_noise(FIXED, (batch, *bundle.sample_shape))
    return call_conditions(bundle.condition_network, x, middle_timestep(bundle), rows)


def _mean(latencies: list[Latency], counts: list[int]) -> tuple[float, Any]:
    """Return (seconds, seconds in each block) of a call, averaged over the networks by their number of calls."""
    median = float(np.average([latency.median for latency in latencies], weights=counts))
    return median, np.average([latency.blocks for latency in latencies], axis=0, weights=counts)


def memory(bundle: Bundle, reference: Path, batch: int, threads: int | None, conditions: Conditions) -> dict[str, Any]:
    """Return the memory of one call of each network, measured in a process of its own (memory.py)."""
    files = [bundle.path / name for name in bundle.precisions.files.values()] if bundle.precisions else []
    models = list(dict.fromkeys(files)) or [bundle.model_path]
    conditions = first_rows(bundle, 1, conditions)
    mine, before = (
        memory_of_one_call(bundle, models, batch, threads=threads, conditions=conditions, engine=engine)
        for models, engine in ((models, bundle.engine), ([reference], CPU_ENGINE))
    )
    return {
        "bundle": mine.to_json(),
        "float": before.to_json(),
        "share": round(mine.added / before.added, 4) if before.added > 0 else None,
    }
