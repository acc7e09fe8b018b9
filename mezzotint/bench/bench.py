"""mezzotint bench: the time of one call, the operations that take it, and the floor of the integer kernels alone.

There are two measurements. The latency is measured on plain sessions, in blocks forwards and backwards over everything
that is compared (the float model, the bundle, the peers of beside_peers.py), so that a drift of the machine affects all
of them equally. A ratio is the ratio of the medians over all calls; its range is the smallest and the largest ratio of
blocks measured in the same turn.

The breakdown comes from the engine's own profiler, on another session of the same file. It names the nodes of the
graph that the engine built, but it lengthens the call (of a small model by half and more), so its times are good for
shares and not for the latency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.graph.ops import BRANCH_REASON
from mezzotint.compiler.stages import scratch
from mezzotint.runtime import streams
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.latency import Latency, in_turns, ratio
from mezzotint.runtime.open_sizes import open_size
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.providers.openvino import OpenVino, OpenVinoNetwork
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.session import Denoiser, running_version, untested_version
from mezzotint.runtime.signature import Predict
from mezzotint.runtime.streams import FIXED

from ..text.report import model_bytes
from .beside_peers import CALIBRATION, PICTURES, PeerResult, PeerRuns, advice
from .openvino_trace import trace_openvino
from .pairs import folder_bytes, middle_timestep
from .reference import check_float_model
from .trace import Breakdown, read_trace

MAX_PROFILED_CALLS = 10  # a trace takes about 1 kB for each node of each call
OPEN_SIZE = 77  # what a condition's open dimension becomes: the tokens of a CLIP prompt
NOTES = (
    "one call is measured without the profiler; profiled times contain its own overhead, some microseconds for each "
    "node: compare their shares, and expect that many small nodes weigh a little too much",
    "the floor is the median call times the integer kernels' share of all kernel time",
    "the additions and multiplications of a norm's scale and shift count as elementwise",
)


@dataclass(frozen=True)
class Bench:
    """The measurements of one `mezzotint bench`."""

    bundle: Bundle
    inputs: Mapping[str, str]
    batch: int
    threads: int
    repeats: int
    rounds: int
    quantized: Latency
    floating: Latency | None
    breakdown: Breakdown
    float_bytes: int | None = None
    fidelity: dict[str, Any] | None = None
    peers: tuple[PeerResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Times in milliseconds for one call; shares are of all kernel time, 0 to 1."""
        breakdown, total = self.breakdown, self.breakdown.kernel_seconds
        floating = self.floating
        islands = self.bundle.manifest.islands
        branches = {name for name, reason in islands.items() if reason.startswith(BRANCH_REASON)}

        def cost(nodes: int, seconds: float) -> dict[str, Any]:
            return {"nodes": nodes, "ms": _ms(seconds), "share": round(seconds / total, 6) if total else 0.0}

        return {
            "bundle": str(self.bundle.path),
            "engine": self.bundle.usage(self.threads).to_json(),
            "onnxruntime": running_version(),
            "onnxruntime_tested": untested_version() is None,
            "threads": self.threads,
            "batch": self.batch,
            "timestep": middle_timestep(self.bundle),
            "repeats": self.repeats,
            "rounds": self.rounds,
            "inputs": dict(self.inputs),
            "call_ms": _latency(self.quantized),
            "float_call_ms": None if floating is None else _latency(floating),
            "speedup": None if floating is None else round(floating.median / self.quantized.median, 4),
            "speedup_range": None if floating is None else _range(floating, self.quantized),
            "model_bytes": model_bytes(self.bundle),
            "float_bytes": self.float_bytes,
            "fidelity": self.fidelity,
            "peers": [self._peer(peer) for peer in self.peers],
            "advice": self._advice(),
            "floor": {
                "integer_kernels_ms": _ms(breakdown.integer_seconds),
                "share": round(breakdown.integer_share, 6),
                "call_ms": _ms(self.quantized.median * breakdown.integer_share),
            },
            "profile": {
                "calls": breakdown.calls,
                "call_ms": _ms(breakdown.call_seconds),
                "kernels_ms": _ms(total),
                "nodes": sum(o.nodes for o in breakdown.operations),
            },
            "branches": cost(*breakdown.named(branches)) if branches else None,
            "groups": [{"group": group, **cost(*both)} for group, both in breakdown.groups().items()],
            "operations": [{"op": o.op, "group": o.group, **cost(o.nodes, o.seconds)} for o in breakdown.operations],
            "notes": list(NOTES),
        }

    def _advice(self) -> list[str]:
        if self.floating is None or self.fidelity is None:
            return []
        return advice(self.floating.median / self.quantized.median, self.fidelity, self.peers, self.floating)

    def _peer(self, peer: PeerResult) -> dict[str, Any]:
        timed = None if peer.latency is None or self.floating is None else (self.floating, peer.latency)
        return {
            "peer": peer.name,
            "error": peer.error,
            "call_ms": None if peer.latency is None else _latency(peer.latency),
            "speedup": None if timed is None else round(ratio(*timed).value, 4),
            "speedup_range": None if timed is None else _range(*timed),
            "bytes": peer.bytes,
            "fidelity": peer.fidelity,
            "seconds_to_quantize": None if peer.seconds is None else round(peer.seconds, 2),
        }


def run_bench(
    bundle: Bundle,
    *,
    batch: int | None = None,
    threads: int = 2,
    float_model: Path | None = None,
    repeats: int = 8,
    rounds: int = 2,
    peers: Sequence[str] = (),
    calibration: int = CALIBRATION,
    pictures: int = PICTURES,
    progress: Progress = silent,
) -> Bench:
    """Measure the latency and the breakdown of one call at the deployment's middle timestep.

    `batch` None is the graph's own batch size, or 1. Each network is called in 2 `rounds` blocks of `repeats`. `peers`
    are names of peers.py; they need the float model and `calibration` calls of its trajectory, and draw `pictures`
    images at least. A peer that fails is reported with its error. Raises InputError for a float model that is missing
    or does not fit, for peers without a float model, and for a batch or a condition that the graph does not accept.
    """
    if peers and float_model is None:
        raise InputError("peers start from the float model", hint="give --float FILE.onnx")
    if min(repeats, rounds, calibration, pictures) < 1:
        what = f"{repeats} calls, {rounds} rounds, {calibration} to calibrate on, {pictures} images"
        raise InputError(what, hint="each is at least 1")
    if float_model is not None:
        check_float_model(float_model)
    net = bundle.denoiser(threads)
    batch = batch or net.fixed_batch or 1
    check_batch(net, batch, bundle, "--batch ")
    conditions = make_conditions(net, bundle, batch)
    rows = {name: array for name, (array, _) in conditions.items()}
    inputs = {bundle.signature.sample: f"float32 {[batch, *bundle.sample_shape]}, random normal"}
    inputs |= {name: f"{array.dtype} {list(array.shape)}, {how}" for name, (array, how) in conditions.items()}
    x, t = initial_noise(FIXED, (batch, *bundle.sample_shape)), middle_timestep(bundle)
    shared = bundle, inputs, batch, threads, repeats, rounds

    def times(*nets: Any) -> list[Latency]:
        calls: list[Predict] = [lambda x, t, net=net: net(x, t, **rows) for net in nets]  # type: ignore[misc]
        return in_turns(calls, x, t, repeats=repeats, rounds=rounds)

    if float_model is None:
        return Bench(*shared, times(net)[0], None, profile(bundle, batch, rows, threads, repeats))
    exact = Denoiser(float_model, bundle.signature, threads=threads)
    with PeerRuns(bundle, float_model, exact, rows, batch, threads, pictures) as runs:
        fidelity, results = runs.prepare(peers, calibration, progress) if peers else (None, [])
        slow, mine, *others = times(exact, net, *runs.nets.values())
        results = runs.timed(results, others)
    breakdown = profile(bundle, batch, rows, threads, repeats)
    return Bench(*shared, mine, slow, breakdown, folder_bytes(float_model), fidelity, tuple(results))


def check_batch(net: Denoiser, batch: int, bundle: Bundle, option: str) -> None:
    """Raise InputError where another batch size is written into the graph; `option` is what it was given by."""
    if net.fixed_batch not in (None, batch):
        raise InputError(
            f"the batch size {net.fixed_batch} is written into the graph, it cannot run {batch}",
            where=str(bundle.path),
            hint=f"leave {option.rstrip(' =')} out, or give {option}{net.fixed_batch}",
        )


def make_conditions(net: Denoiser, bundle: Bundle, batch: int) -> dict[str, tuple[npt.NDArray[Any], str]]:
    """Return for each condition an array `[batch, ...]` with equal rows, and how it was made.

    The values are good for timing only. Open dimensions with the name of one of the sample's take its size, others
    that of the calibration, or OPEN_SIZE.
    """
    declared = net.inputs[bundle.signature.sample][1]
    sizes = dict(bundle.manifest.calibration.sizes)
    sizes |= {d: n for d, n in zip(declared, (batch, *bundle.sample_shape), strict=True) if isinstance(d, str)}
    rng = streams.BENCH_CONDITIONS.generator(FIXED)
    conditions: dict[str, tuple[npt.NDArray[Any], str]] = {}
    for name in bundle.signature.conditions:
        dtype, shape = net.inputs[name]
        # Another name for the batch is still the batch: a condition's first dimension counts samples.
        rest = [d if isinstance(d, int) else open_size(d, sizes, OPEN_SIZE) for d in shape[1:]]
        if dtype.kind == "f":
            row, how = rng.standard_normal((1, *rest)).astype(dtype), "random normal"
        elif dtype.kind == "b":
            row, how = np.ones((1, *rest), dtype), "all true"
        else:
            row, how = np.zeros((1, *rest), dtype), "zeros"
        conditions[name] = (np.repeat(row, batch, axis=0), how)
    return conditions


def profile(bundle: Bundle, batch: int, conditions: Conditions, threads: int | None, repeats: int) -> Breakdown:
    """Run the bundle's graph under its engine's profiler; the first call warms up and is not counted."""
    x, t = initial_noise(FIXED, (batch, *bundle.sample_shape)), middle_timestep(bundle)
    calls = min(repeats, MAX_PROFILED_CALLS)
    if isinstance(bundle.engine, OpenVino):
        engine = replace(bundle.engine, options=(*bundle.engine.options, ("PERF_COUNT", "YES")))
        timed = bundle.on(engine).denoiser(threads)
        return trace_openvino(cast(OpenVinoNetwork, timed.network), lambda: timed(x, t, **conditions), calls)
    with scratch() as folder:
        net = Denoiser(
            bundle.model_path,
            bundle.signature,
            threads=threads,
            deployed=bundle.deployed_timesteps,
            profile=folder / "trace",
            engine=bundle.engine,
        )
        for _ in range(1 + calls):
            net(x, t, **conditions)
        return read_trace(Path(net.session.end_profiling()))


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def _range(exact: Latency, other: Latency) -> list[float]:
    speed = ratio(exact, other)
    return [round(speed.low, 4), round(speed.high, 4)]


def _latency(latency: Latency) -> dict[str, float]:
    return {"median": _ms(latency.median), "minimum": _ms(latency.minimum)}
