"""One call of a large network on several engines, each in a process of its own: seconds, memory, distance from float.

    python -m tools.bench_calls FLOAT.onnx BUNDLE [BUNDLE ...] [--peers] [--batch 2] [--threads 2] [--calls 3]

For networks of which one process cannot hold several, where `mezzotint bench --peers` needs them all at once. The float
file runs on fp32 onnxruntime, a bundle of the openvino form in OpenVINO (f32, and bf16 where the processor has it), any
other in onnxruntime. --peers adds OpenVINO without quantization, and NNCF's two settings, calibrated on noise at the
deployed timesteps. All call the same sample at the same timestep with the same conditions; the first call is not timed.
Memory is the largest resident set of the process while it opens and calls the network, less what Python had before. The
processes come one after the other, twice, the second time in reverse order: a machine that drifts shows it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mezzotint.bench import peers
from mezzotint.bench.bench import make_conditions
from mezzotint.bench.pairs import middle_timestep
from mezzotint.compiler.core.memory import PeakMemory
from mezzotint.io.children import run_program
from mezzotint.runtime.bundle.bundle import MODEL, Bundle, open_bundle
from mezzotint.runtime.compare import ratio_db
from mezzotint.runtime.engine import EnginePrecision
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.latency import timed_block
from mezzotint.runtime.providers.names import CPU_NAME, find_engine
from mezzotint.runtime.providers.openvino import OPENVINO
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.session import Denoiser
from tools.rooms import ROOT

FLOAT = "fp32 onnxruntime"
PEER_CALLS = 4  # that a peer is calibrated on


@dataclass(frozen=True)
class CallJob:
    """What one process does: call `file` on `engine`, or write a peer's file (`make`) with that name to `file`."""

    name: str
    file: str
    bundle: str  # whose signature, timesteps and conditions are used
    engine: str = CPU_NAME
    precision: EnginePrecision | None = None
    make: str = ""
    source: str = ""  # the float file that a peer is made of


@dataclass(frozen=True)
class CallFigures:
    """Seconds of the timed calls, the memory of the process in megabytes, and the distance from float in decibels."""

    seconds: tuple[float, ...]
    memory_mb: float
    epsilon_db: float | None = None


def jobs_of(exported: Path, bundles: Sequence[Path], folder: Path, *, with_peers: bool) -> list[CallJob]:
    """Return the processes in order: float first, then the bundles, then the peers that are installed here."""
    first = str(bundles[0])
    jobs = [CallJob(FLOAT, str(exported), first)]
    there = peers.available()
    floats: list[EnginePrecision] = ["f32"] if peers.OPENVINO_F32 in there else []
    floats += ["bf16"] if floats and has_bf16() else []
    for path in bundles:
        if open_bundle(path).manifest.target != OPENVINO:
            jobs.append(CallJob(own_name(path, "onnxruntime"), str(path / MODEL), str(path)))
            continue
        for precision in floats:
            name = own_name(path, f"OpenVINO {precision}")
            jobs.append(CallJob(name, str(path / MODEL), str(path), OPENVINO, precision))
    if with_peers:
        jobs += [CallJob(f"OpenVINO {p}", str(exported), first, OPENVINO, p) for p in floats]
        for peer in (peers.NNCF, peers.NNCF_SMOOTH):
            if peer in there:
                made = str(folder / peer / "nncf.xml")
                jobs.append(CallJob(peer, made, first, OPENVINO, "f32", make=peer, source=str(exported)))
    return jobs


def own_name(bundle: Path, engine: str) -> str:
    """Return what the figures of a bundle are called."""
    return f"{bundle.name} in {engine}"


def has_bf16() -> bool:
    """Return whether OpenVINO's CPU device computes in bfloat16 on this processor."""
    from openvino import Core

    return "BF16" in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def measure_calls(
    jobs: Sequence[CallJob], folder: Path, *, batch: int, threads: int, calls: int, rounds: int = 2
) -> dict[str, CallFigures]:
    """Run each job in a process of its own, all of them in each round, and return the figures by name.

    Raises RuntimeError with the process's own words where one fails.
    """
    for job in jobs:
        if job.make and not Path(job.file).is_file():
            _child({"make": asdict(job), "batch": batch, "threads": threads})
    seconds: dict[str, list[float]] = {job.name: [] for job in jobs}
    memory, distance = dict.fromkeys(seconds, 0.0), dict.fromkeys(seconds, 0.0)
    order = [job for turn in range(rounds) for job in (reversed(jobs) if turn % 2 else jobs)]
    for number, job in enumerate(order):
        output = folder / f"{file_name(job.name)}.npy"
        task = {"call": asdict(job), "batch": batch, "threads": threads, "calls": calls, "output": str(output)}
        found = _child(task)
        seconds[job.name] += found["seconds"]
        memory[job.name] = max(memory[job.name], found["memory_mb"])
        exact = np.load(folder / f"{file_name(jobs[0].name)}.npy").astype(np.float64)
        error = np.load(output).astype(np.float64) - exact
        distance[job.name] = ratio_db(float((exact**2).sum()), float((error**2).sum()))
        print(f"[{number + 1}/{len(order)}] {job.name}: {found['seconds']}", file=sys.stderr, flush=True)
    return {
        job.name: CallFigures(
            tuple(seconds[job.name]), memory[job.name], None if job is jobs[0] else distance[job.name]
        )
        for job in jobs
    }


def file_name(name: str) -> str:
    """Return a network's name as that of a file."""
    return "".join(c if c.isalnum() else "-" for c in name)


def calls_table(figures: dict[str, CallFigures]) -> str:
    """Return a table in Markdown: median seconds, the ratio to float, memory, epsilon."""
    reference = float(np.median(next(iter(figures.values())).seconds))
    rows = ["| | seconds of a call | speed | memory, GB | SQNR of epsilon |", "|---|---|---|---|---|"]
    for name, found in figures.items():
        middle, near = float(np.median(found.seconds)), found.epsilon_db
        spread = f"{middle:.2f} ({min(found.seconds):.2f} to {max(found.seconds):.2f})"
        decibels = "" if near is None else f"{near:.1f}"
        rows.append(f"| {name} | {spread} | {reference / middle:.2f}x | {found.memory_mb / 1e3:.2f} | {decibels} |")
    return "\n".join(rows)


def _child(task: dict[str, Any]) -> Any:
    run = run_program([sys.executable, "-m", "tools.bench_calls", "--task", json.dumps(task)], ROOT)
    if run.returncode:
        raise RuntimeError(f"the process for {task} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def _task(task: dict[str, Any]) -> dict[str, Any]:
    job = CallJob(**(task.get("call") or task["make"]))
    bundle = open_bundle(Path(job.bundle))
    return _make(job, bundle, task) if job.make and "make" in task else _call(job, bundle, task)


def _call(job: CallJob, bundle: Bundle, task: dict[str, Any]) -> dict[str, Any]:
    x, t = samplers.initial_noise(0, (task["batch"], *bundle.sample_shape)), middle_timestep(bundle)
    gc.collect()
    before = psutil.Process().memory_info().rss / 1e6
    with PeakMemory() as peak:
        engine = find_engine(job.engine, precision=job.precision)
        net = Denoiser(job.file, bundle.signature, threads=task["threads"], engine=engine)
        rows = {key: array for key, (array, _) in make_conditions(net, bundle, task["batch"]).items()}
        np.save(task["output"], net(x, t, **rows))
        seconds = timed_block(lambda x, t: net(x, t, **rows), x, t, task["calls"])
    return {"seconds": [round(s, 6) for s in seconds], "memory_mb": peak.peak_mb - before}


def _make(job: CallJob, bundle: Bundle, task: dict[str, Any]) -> dict[str, Any]:
    """Write a peer's file. It is calibrated on single samples, since NNCF keeps all activations of a call at once."""
    folder = Path(job.file).parent
    folder.mkdir(parents=True, exist_ok=True)
    net = Denoiser(job.source, bundle.signature, threads=task["threads"])
    rows = {key: array for key, (array, _) in make_conditions(net, bundle, 1).items()}
    del net
    times = bundle.deployment.timesteps
    calls = [
        (samplers.initial_noise(1, (1, *bundle.sample_shape), first=i), times[i % len(times)], rows)
        for i in range(PEER_CALLS)
    ]
    peers.prepare_peer(job.make, Path(job.source), bundle.signature, calls, folder, task["threads"])
    return {"file": job.file}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float_file", type=Path, nargs="?")
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--peers", action="store_true", help="OpenVINO without quantization, and NNCF")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=3, help="timed calls of a process")
    parser.add_argument("--keep", type=Path, help="keep the peers' files in this folder")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.task is not None:
        print(json.dumps(_task(json.loads(args.task))))
        return 0
    if args.float_file is None or not args.bundles:
        parser.error("a float file and at least one bundle of it are needed")
    try:
        with tempfile.TemporaryDirectory() as folder:
            kept = args.keep or Path(folder)
            jobs = jobs_of(
                args.float_file.absolute(), [b.absolute() for b in args.bundles], kept, with_peers=args.peers
            )
            sizes = {"batch": args.batch, "threads": args.threads, "calls": args.calls}
            print(calls_table(measure_calls(jobs, Path(folder), **sizes)))
    except MezzotintError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
