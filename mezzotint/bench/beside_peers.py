"""Other quantizers of the same float model beside the bundle: speed, size, and never one without the faith.

Each peer (peers.py) is calibrated on network calls of the float trajectory: `calibration` of them, at the batch size of
the bench, spread evenly over as many trajectories as it takes. How near each is to the float network is measured as it
is for the bundle, by the SQNR of epsilon at every call of other trajectories, from noise that nobody was calibrated on.
Conditions are the bench's own, made up; guidance is left out, as everything here is about single calls.

What a peer says when it fails is told in its place, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.core.pipeline import Progress
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import StepSQNR, json_db
from mezzotint.runtime.errors import InputError, MezzotintError
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.samplers import StepInfo
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Timestep

from . import peers
from .pairs import Latency, unseen_seed
from .peers import Call, Images, Predict

CALIBRATION = 16  # network calls
PICTURES = 4  # at least, on which the SQNR is measured


@dataclass(frozen=True)
class Standing:
    """A peer: its latency, bytes and SQNR of epsilon, or the `error` that kept it out."""

    name: str
    error: str | None = None
    latency: Latency | None = None
    bytes: int | None = None
    faith: dict[str, Any] | None = None
    seconds: float | None = None


class Rivals:
    """The peers of one bundle, and the folder that their files are in; a context manager.

    `nets` are those that work, by name, called as `net(x, t, **conditions)`; `rows` are the conditions `[batch, ...]`.
    """

    def __init__(
        self,
        bundle: Bundle,
        model: Path,
        exact: Denoiser,
        rows: Mapping[str, npt.NDArray[Any]],
        batch: int,
        threads: int | None,
    ) -> None:
        self.nets: dict[str, Predict] = {}
        self._bundle, self._model, self._exact, self._rows = bundle, model, exact, rows
        self._batch, self._threads = batch, threads
        self._plan = bundle.plan(guidance=1.0)
        self._folder = TemporaryDirectory(prefix="mezzotint-peers-")

    def __enter__(self) -> Rivals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.nets.clear()  # before the files that they may have mapped into memory
        self._folder.cleanup()

    def prepare(
        self, names: Sequence[str], calibration: int, progress: Progress
    ) -> tuple[dict[str, Any], list[Standing]]:
        """(the bundle's own SQNR of epsilon, what is known of each peer before it is timed). Raises InputError."""
        if wrong := [name for name in names if name not in peers.PEERS]:
            raise InputError(f"no peer is called {wrong[0]!r}", hint=f"there are {', '.join(peers.PEERS)}")
        calls = self._calls(calibration)
        found = []
        for done, name in enumerate(names):
            progress("quantize with peers", done, len(names))
            found.append(self._quantized(name, calls))
        progress("quantize with peers", len(names), len(names))
        faith = self._faith(found, progress)
        return faith[""], [replace(peer, faith=faith.get(peer.name), error=peer.error) for peer in found]

    def timed(self, standings: Sequence[Standing], latencies: Sequence[Latency]) -> list[Standing]:
        """With the latencies of `nets`, in their order."""
        by_name = dict(zip(self.nets, latencies, strict=True))
        return [replace(peer, latency=by_name.get(peer.name)) for peer in standings]

    def _calls(self, count: int) -> list[Call]:
        """Calls of the float trajectory from the noise of the calibration's seed."""
        trajectories = -(-count // len(self._plan.calls))
        calls: list[Call] = []

        def record(x: Images, t: Timestep) -> Images:
            calls.append((x, t, self._rows))
            return self._float(x, t)

        for i in range(trajectories):
            self._follow(record, int(self._bundle.manifest["calibration"]["seed"]), i * self._batch)
        return [calls[round(k)] for k in np.linspace(0, len(calls) - 1, count)]

    def _float(self, x: Images, t: Timestep) -> Images:
        return self._exact(x, t, **self._rows)

    def _follow(self, net: Predict, seed: int, first: int, look: samplers.Callback | None = None) -> None:
        x = samplers.initial_noise(seed, (self._batch, *self._bundle.sample_shape), first=first)
        noise = samplers.seeded_noise(seed, first=first)
        samplers.sample(net, x, self._bundle.schedule, self._plan, noise=noise, callback=look)

    def _quantized(self, name: str, calls: Sequence[Call]) -> Standing:
        if name not in peers.available():
            return Standing(name, "not installed")
        folder = Path(self._folder.name) / name
        folder.mkdir()
        start = time.perf_counter()
        try:
            net, file = peers.quantize(name, self._model, self._bundle.signature, calls, folder, self._threads)
            x, t, conditions = calls[-1]
            net(x, t, **conditions)
        except Exception as error:  # somebody else's code
            return Standing(name, _told(error))
        self.nets[name] = net
        return Standing(name, bytes=_bytes(file), seconds=time.perf_counter() - start)

    def _faith(self, standings: Sequence[Standing], progress: Progress) -> dict[str, dict[str, Any]]:
        """SQNR of epsilon by name, the bundle's under the empty one."""
        mine = self._bundle.denoisers(self._plan, self._threads)
        sqnr = {name: StepSQNR() for name in ("", *self.nets)}
        trajectories = -(-PICTURES // self._batch)
        total, done = trajectories * len(self._plan.calls), 0

        def look(info: StepInfo) -> None:
            nonlocal done
            for name, found in sqnr.items():
                net = self.nets[name] if name else mine[info.index]
                found.add(info.index, info.output, net(info.x, info.timestep, **self._rows))
            done += 1
            progress("faith of peers", done, total)

        for i in range(trajectories):
            self._follow(self._float, unseen_seed(self._bundle), i * self._batch, look)
        pictures = trajectories * self._batch
        return {
            name: {
                "eps_sqnr_db": json_db(found.pooled()),
                "eps_sqnr_db_worst_step": json_db(found.worst()[1]),
                "worst_step": found.worst()[0],
                "pictures": pictures,
            }
            for name, found in sqnr.items()
        }


def _bytes(file: Path) -> int:
    """Of all that a peer wrote under one name: OpenVINO has its graph and its weights in two files."""
    return sum(f.stat().st_size for f in file.parent.glob(f"{file.name.partition('.')[0]}.*"))


def _told(error: Exception) -> str:
    what = error.what if isinstance(error, MezzotintError) else f"{type(error).__name__}: {error}"
    return what.strip().splitlines()[0] if what.strip() else type(error).__name__
