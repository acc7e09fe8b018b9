"""Peers of a bundle, measured on the same float model: speed, size, and always the fidelity.

Each peer (peers.py) gets network calls of the float trajectory to calibrate on: `calibration` of them, at the batch
size of the bench, spread evenly over as many trajectories as it takes. Its fidelity is measured as the bundle's: the
SQNR of epsilon at every call of other trajectories, from noise that nothing was calibrated on. Conditions are the
bench's own random ones; guidance is left out, because single calls are compared. Each network also draws images from
the noise of those trajectories, and their PSNR decides: `advice` says where plain bfloat16 is the better choice.

A peer that fails is reported with its error, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.stages import scratch
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import PEAK, StepSQNR, json_db, psnr_db
from mezzotint.runtime.errors import InputError, MezzotintError
from mezzotint.runtime.latency import Latency
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.guidance import Network
from mezzotint.runtime.sampling.samplers import StepInfo
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Timestep

from . import peers
from .pairs import folder_bytes, unseen_seed
from .peers import Call

CALIBRATION = 16  # network calls
PICTURES = 4  # at least, on whose trajectories fidelity is measured


@dataclass(frozen=True)
class PeerResult:
    """A peer's latency, bytes and fidelity, or the `error` that it failed with."""

    name: str
    error: str | None = None
    latency: Latency | None = None
    bytes: int | None = None
    fidelity: dict[str, Any] | None = None
    seconds: float | None = None


class PeerRuns:
    """The peers of one bundle and the folder of their files; a context manager.

    `nets` are the working peers by name, called as `net(x, t, **conditions)`; `rows` are the conditions `[batch, ...]`.
    """

    def __init__(
        self,
        bundle: Bundle,
        model: Path,
        exact: Denoiser,
        rows: Mapping[str, npt.NDArray[Any]],
        batch: int,
        threads: int | None,
        pictures: int = PICTURES,
    ) -> None:
        self.nets: dict[str, Network] = {}
        self._bundle, self._model, self._exact, self._rows = bundle, model, exact, rows
        self._batch, self._threads, self._pictures = batch, threads, pictures
        self._plan = bundle.plan(guidance=1.0)
        self._files = ExitStack()
        self._folder = self._files.enter_context(scratch())

    def __enter__(self) -> PeerRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.nets.clear()  # before the files that they may have mapped into memory
        self._files.__exit__(kind, error, trace)

    def prepare(
        self, names: Sequence[str], calibration: int, progress: Progress
    ) -> tuple[dict[str, Any], list[PeerResult]]:
        """Return (the bundle's fidelity, the peers' results without latency). Raises InputError for unknown names."""
        if wrong := [name for name in names if name not in peers.PEERS]:
            raise InputError(f"no peer is called {wrong[0]!r}", hint=f"there are {', '.join(peers.PEERS)}")
        calls = self._calls(calibration)
        results = []
        for done, name in enumerate(names):
            progress("prepare peers", done, len(names))
            results.append(self._prepared(name, calls))
        progress("prepare peers", len(names), len(names))
        fidelity = self._fidelity(progress)
        return fidelity[""], [replace(peer, fidelity=fidelity.get(peer.name), error=peer.error) for peer in results]

    def timed(self, results: Sequence[PeerResult], latencies: Sequence[Latency]) -> list[PeerResult]:
        """Return the results with the latencies of `nets`, which come in the order of `nets`."""
        by_name = dict(zip(self.nets, latencies, strict=True))
        return [replace(peer, latency=by_name.get(peer.name)) for peer in results]

    def _calls(self, count: int) -> list[Call]:
        """Return `count` calls of the float trajectory, from the noise of the calibration's seed."""
        trajectories = -(-count // len(self._plan.calls))
        calls: list[Call] = []

        def record(x: Images, t: Timestep) -> Images:
            calls.append((x, t, self._rows))
            return self._float(x, t)

        for i in range(trajectories):
            self._follow(record, int(self._bundle.manifest.calibration.seed), i * self._batch)
        return [calls[round(k)] for k in np.linspace(0, len(calls) - 1, count)]

    def _float(self, x: Images, t: Timestep) -> Images:
        return self._exact(x, t, **self._rows)

    def _follow(
        self, net: Network | Sequence[Network], seed: int, first: int, look: samplers.Callback | None = None
    ) -> Images:
        x = samplers.initial_noise(seed, (self._batch, *self._bundle.sample_shape), first=first)
        noise = samplers.seeded_noise(seed, first=first)
        return samplers.sample(net, x, self._bundle.schedule, self._plan, noise=noise, callback=look)

    def _prepared(self, name: str, calls: Sequence[Call]) -> PeerResult:
        if name not in peers.available():
            return PeerResult(name, "not installed")
        folder = self._folder / name
        folder.mkdir()
        start = time.perf_counter()
        try:
            net, file = peers.prepare_peer(name, self._model, self._bundle.signature, calls, folder, self._threads)
            x, t, conditions = calls[-1]
            net(x, t, **conditions)
        except Exception as error:  # code of other projects
            return PeerResult(name, _first_line(error))
        self.nets[name] = net
        return PeerResult(name, bytes=_bytes(file), seconds=time.perf_counter() - start)

    def _fidelity(self, progress: Progress) -> dict[str, dict[str, Any]]:
        """Return the SQNR of epsilon and the PSNR of images by name; the bundle's has the empty name."""
        mine = self._bundle.denoisers(self._plan, self._threads)
        sqnr = {name: StepSQNR() for name in ("", *self.nets)}
        psnr: dict[str, list[float]] = {name: [] for name in sqnr}
        trajectories = -(-self._pictures // self._batch)
        total, done = trajectories * len(self._plan.calls) * (1 + len(sqnr)), 0

        def count() -> None:
            nonlocal done
            done += 1
            progress("fidelity of peers", done, total)

        def look(info: StepInfo) -> None:
            for name, errors in sqnr.items():
                errors.add(info.index, info.output, self._predict(name, mine[info.index], info.x, info.timestep))
            count()

        for i in range(trajectories):
            seed, first = unseen_seed(self._bundle), i * self._batch
            exact = self._follow(self._float, seed, first, look)
            for name, found in psnr.items():
                drawn = self._follow([self._counted(name, call, count) for call in mine], seed, first)
                found += psnr_db(np.clip(exact, -1, 1), np.clip(drawn, -1, 1), peak=PEAK).tolist()
        return {
            name: {
                "eps_sqnr_db": json_db(errors.pooled()),
                "eps_sqnr_db_worst_step": json_db(errors.worst()[1]),
                "worst_step": errors.worst()[0],
                "psnr_db_median": json_db(float(np.median(psnr[name]))),
                "psnr_db_p10": json_db(float(np.percentile(psnr[name], 10, method="lower"))),
                "pictures": trajectories * self._batch,
            }
            for name, errors in sqnr.items()
        }

    def _counted(self, name: str, mine: Denoiser, count: Callable[[], None]) -> Network:
        """Return a network's call at one place of the trajectory, which counts itself."""

        def call(x: Images, t: Timestep) -> Images:
            count()
            return self._predict(name, mine, x, t)

        return call

    def _predict(self, name: str, mine: Denoiser, x: Images, t: Timestep) -> Images:
        net = self.nets[name] if name else mine
        return net(x, t, **self._rows)


def advice(speed: float, fidelity: Mapping[str, Any], results: Sequence[PeerResult], floating: Latency) -> list[str]:
    """Return what the figures recommend: plain bfloat16 where it is faster than the bundle and its images are nearer.

    `speed` is the bundle's, as a ratio of the float network's; decibels of None are an image without any difference.
    """
    found = []
    for peer in results:
        if peer.name != peers.OPENVINO_BF16 or peer.latency is None or peer.fidelity is None:
            continue
        theirs = floating.median / peer.latency.median
        mine_db, their_db = (_decibels(part["psnr_db_median"]) for part in (fidelity, peer.fidelity))
        figures = f"{theirs:.2f}x and {their_db:.1f} dB of images, this bundle {speed:.2f}x and {mine_db:.1f} dB"
        if theirs >= speed and their_db >= mine_db:
            found.append(
                f"OpenVINO in plain bfloat16, without quantization, is the better choice on this machine: {figures}. "
                "The bundle's file is smaller"
            )
        elif theirs >= speed:
            found.append(f"OpenVINO in plain bfloat16 is faster here and its images are farther from float: {figures}")
    return found


def _decibels(value: float | None) -> float:
    return float("inf") if value is None else value


def _bytes(file: Path) -> int:
    """Return the size of a peer's files: OpenVINO writes its graph and its weights as two files of one name."""
    if file.suffix == ".onnx":
        return folder_bytes(file)
    return sum(f.stat().st_size for f in file.parent.glob(f"{file.name.partition('.')[0]}.*"))


def _first_line(error: Exception) -> str:
    text = error.what if isinstance(error, MezzotintError) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
