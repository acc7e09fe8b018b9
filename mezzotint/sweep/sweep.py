"""The calls of a sweep are timed: here, or on each machine of a cluster, which does nothing else meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.engine import EngineUsage
from mezzotint.runtime.errors import MezzotintWarning
from mezzotint.runtime.latency import Latency, in_turns, ratio
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Predict
from mezzotint.runtime.streams import FIXED

from ..bench.bench import check_batch, make_conditions
from ..bench.pairs import middle_timestep
from ..bench.reference import check_float_model
from ..cluster.connection import check_cluster, open_cluster
from ..cluster.ledger import ClusterError
from ..cluster.placement import Fetch, Machine, this_computer
from ..shards.carried import CarriedBundle, CarriedNetwork
from ..shards.drawing import GPU_ENGINES
from .points import SweepPoints

STAGE = "sweep"


class FailedMachines(MezzotintWarning):
    """Some machines of a cluster could not be measured."""


@dataclass(frozen=True)
class SweptCall:
    """The latency of one call, and that of the float model where it was measured in turns with it.

    `batch` are the rows of the call: with guidance a sample has `rows_of_sample` 2.
    """

    batch: int
    threads: int
    quantized: Latency
    floating: Latency | None
    rows_of_sample: int = 1

    def to_json(self) -> dict[str, Any]:
        """Times in milliseconds for one call; `samples_per_second` is of calls, one behind the other."""
        speed = None if self.floating is None else ratio(self.floating, self.quantized)
        return {
            "batch": self.batch,
            "threads": self.threads,
            "call_ms": _ms(self.quantized),
            "samples_per_second": round(self.batch / self.rows_of_sample / self.quantized.median, 4),
            "float_call_ms": None if self.floating is None else _ms(self.floating),
            "speedup": None if speed is None else round(speed.value, 4),
            "speedup_range": None if speed is None else [round(speed.low, 4), round(speed.high, 4)],
        }


@dataclass(frozen=True)
class MachineSweep:
    """The calls on one machine, and what the bundle ran on there."""

    machine: Machine
    usage: EngineUsage
    calls: tuple[SweptCall, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the facts of the machine, and its calls in the order of threads and batch sizes."""
        engine = {key: value for key, value in self.usage.to_json().items() if key != "threads"}
        return {**self.machine.to_json(), "engine": engine, "calls": [call.to_json() for call in self.calls]}


@dataclass(frozen=True)
class SweepTimer:
    """How each point of a sweep is timed: 2 `rounds` blocks of `repeats` calls of each network, in turns."""

    points: SweepPoints
    repeats: int = 8
    rounds: int = 2

    def measure(self, bundle: Bundle, float_model: Path | None, progress: Progress = silent) -> MachineSweep:
        """Time a call of a bundle at its deployment's middle timestep, at every point.

        Raises InputError for a batch or a condition that the graph does not accept, before any call is timed.
        """
        calls: list[SweptCall] = []
        first = bundle.denoiser(self.points.threads[0])
        batches = self.points.batches or (first.fixed_batch or 1,)
        for batch in batches:
            check_batch(first, batch, bundle, "--sweep batch=")
        for threads in self.points.threads:
            net = bundle.denoiser(threads)
            exact = None if float_model is None else Denoiser(float_model, bundle.signature, threads=threads)
            for batch in batches:
                rows = {name: array for name, (array, _) in make_conditions(net, bundle, batch).items()}
                x = initial_noise(FIXED, (batch, *bundle.sample_shape))
                nets: list[Predict] = [
                    lambda x, t, net=net, rows=rows: net(x, t, **rows)  # type: ignore[misc]
                    for net in ([net] if exact is None else [exact, net])
                ]
                *floats, mine = in_turns(nets, x, middle_timestep(bundle), repeats=self.repeats, rounds=self.rounds)
                halves = 2 if bundle.deployment.guided else 1
                calls.append(SweptCall(batch, threads, mine, floats[0] if floats else None, halves))
                progress(STAGE, len(calls), len(self.points.threads) * len(batches))
        return MachineSweep(this_computer(), bundle.usage(self.points.threads[0]), tuple(calls))


@dataclass(frozen=True)
class SweepWork:
    """A sweep on a machine, as work for a cluster: the one piece of each machine is its name."""

    timer: SweepTimer
    bundle: CarriedBundle
    reference: CarriedNetwork | None
    threads: int = 1

    def open(self, fetch: Fetch) -> Callable[[str], MachineSweep]:
        """Return the function that measures this machine."""
        bundle = self.bundle.open(fetch, self.threads)
        float_model = None if self.reference is None else self.reference.place(fetch)
        return lambda machine: self.timer.measure(bundle, float_model)


def run_sweep(
    bundle: Bundle,
    timer: SweepTimer,
    *,
    float_model: Path | None = None,
    cluster: str | None = None,
    progress: Progress = silent,
) -> list[MachineSweep]:
    """Return the sweep of this machine, or with a `cluster` (`--cluster`) those of all its machines, by their names.

    A machine of a cluster is asked for with all of its cores, so it waits until the pieces of others are done there.
    Where the engine computes on a GPU it has one. Raises InputError for what the bundle does not accept, and
    ClusterError where all machines failed; warns of some.
    """
    if float_model is not None:
        check_float_model(float_model)
    if cluster is None:
        return [timer.measure(bundle, float_model, progress)]
    check_cluster(cluster)
    with open_cluster(cluster, 1) as opened:
        reference = None if float_model is None else CarriedNetwork.of(opened, float_model)
        work = SweepWork(timer, CarriedBundle.of(bundle, opened), reference)
        places = opened.places()
        names = [place.host for place in places]
        gpus = 1 if bundle.engine.name in GPU_ENGINES else 0
        answers = opened.answers(work, names, stage=STAGE, unit="machines", gpus=gpus, places=places, progress=progress)
        found: dict[int, MachineSweep] = {}
        try:
            for i, answer in answers:
                found[i] = answer.result
        except ClusterError as error:
            if not found:
                raise
            warnings.warn(FailedMachines(str(error)), stacklevel=2)
    return [found[i] for i in sorted(found)]


def _ms(latency: Latency) -> dict[str, float]:
    return {"median": round(latency.median * 1e3, 4), "minimum": round(latency.minimum * 1e3, 4)}
