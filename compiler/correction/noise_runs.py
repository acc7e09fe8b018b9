"""The runs of fit_noise: both networks along float trajectories. A batch of samples is a piece, here or in a worker.

Sums of a batch are added in the order of the batches, so they are the same wherever they come from. Some are made by
BLAS: a worker has as many threads of it as the process that hands the batches out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.progress import part_of_stage
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.noise_fit import NoiseFit, StateFit
from mezzotint.runtime.sampling.samplers import StepInfo
from mezzotint.runtime.signature import Images, Timestep

from ..calibration.calibrate import follow_trajectories, guided_output
from ..core import snapshot
from ..core.blas_threads import blas_threads_for_workers, with_blas_threads
from ..core.context import Context
from ..core.execute import Executor, NetworkSession
from ..core.program import Program
from ..lowering.lower import lower
from .noise_report import Places, chosen_values

Span = tuple[int, int]
"""(first sample, number of samples) of a batch."""


@dataclass(frozen=True, eq=False)
class NoiseNetworks:
    """The float and the quantized network of a program, opened, with the context of the pieces."""

    program: Program
    context: Context
    exact: NetworkSession
    quantized: NetworkSession

    def follow(self, seed: int, span: Span, see: Callable[[StepInfo, Images], None]) -> None:
        """Call both networks along a float trajectory; `see` gets each call and its quantized output."""
        program, latest = self.program, np.zeros(0, np.float32)

        def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
            nonlocal latest
            want = self._call(self.exact, x, t, conditions)
            latest = guided_output(program, self._call(self.quantized, x, t, conditions))
            return want

        context = replace(self.context, seed=seed)
        follow_trajectories(program, context, denoiser, "fit_noise", lambda info: see(info, latest), spans=[span])

    def draw(self, seed: int, span: Span, table: Correction) -> Images:
        """Return the images that the quantized network draws with a correction."""
        last, drawn = len(self.program.deployment.calls) - 1, []

        def keep(info: StepInfo) -> None:
            if info.index == last:
                drawn.append(info.x_next)

        def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
            return self._call(self.quantized, x, t, conditions)

        context = replace(self.context, seed=seed)
        follow_trajectories(self.program, context, denoiser, "fit_noise", keep, table, [span])
        return np.concatenate(drawn)

    def _call(self, network: NetworkSession, x: Images, t: Timestep, conditions: Conditions) -> Images:
        signature = self.program.signature
        return np.asarray(network.call(signature, x, t, conditions)[signature.output], np.float32)


class NoisePiece(Protocol):
    """What is computed of one batch of samples."""

    def perform(self, networks: NoiseNetworks) -> Any: ...


@dataclass(frozen=True)
class FittedBatch:
    """The sums of a batch that the correction is fitted to: a NoiseFit."""

    seed: int
    span: Span

    def perform(self, networks: NoiseNetworks) -> NoiseFit:
        fit = NoiseFit(networks.program.signature.channel_axis)
        networks.follow(self.seed, self.span, lambda info, got: fit.add(info.index, info.output, got))
        return fit


@dataclass(frozen=True, eq=False)
class JudgedBatch:
    """What a held-out batch says of a correction. `places` are the residuals that are wanted of each call."""

    seed: int
    span: Span
    correction: Correction
    places: Mapping[int, Places]

    def perform(self, networks: NoiseNetworks) -> Judgement:
        program = networks.program
        axis, steps = program.signature.channel_axis, program.deployment.solver(program.schedule).steps
        found = Judgement(NoiseFit(axis), StateFit(), {}, [])

        def judge(info: StepInfo, got: Images) -> None:
            found.fit.add(info.index, info.output, got)
            if len(chosen := self.places[info.index]):
                found.residuals[info.index] = chosen_values(info.output, got, chosen, axis)
            step, spare = steps[info.index], np.empty_like(got)
            fixed = step.advance(info.state, self.correction.apply(got, info.index), spare)
            found.states.add(info.index, step.advance(info.state, info.output, spare)["x"], fixed["x"])
            if info.index == len(steps) - 1:
                found.drawn.append(info.x_next)

        networks.follow(self.seed, self.span, judge)
        return found


@dataclass(frozen=True, eq=False)
class Judgement:
    """Sums of outputs and of states, residuals by call, and the images of the float network."""

    fit: NoiseFit
    states: StateFit
    residuals: dict[int, npt.NDArray[np.float64]]
    drawn: list[Images]


@dataclass(frozen=True, eq=False)
class DrawnBatch:
    """The images of a batch, drawn with a correction."""

    seed: int
    span: Span
    table: Correction

    def perform(self, networks: NoiseNetworks) -> Floats:
        return networks.draw(self.seed, self.span, self.table)


@dataclass(frozen=True)
class NoiseWork:
    """Pieces in other processes. The folder holds the program with the quantized graph in its lowered form."""

    context: Context
    blas: int

    def open(self, folder: Path, threads: int) -> Callable[[NoisePiece], Any]:
        """Return the function from a piece to its result."""
        program, _ = snapshot.load_program(folder)
        context = replace(self.context, folder=folder, threads=threads)
        networks = NoiseNetworks(
            program,
            context,
            NetworkSession(folder / "float.onnx", threads=threads),
            NetworkSession(folder / "program.onnx", threads=threads),
        )

        def perform(piece: NoisePiece) -> Any:
            with with_blas_threads(self.blas):
                return piece.perform(networks)

        return perform


class NoiseRuns:
    """Performs pieces in their order, by workers where the context has some. A context manager: it holds files."""

    def __init__(self, program: Program, context: Context) -> None:
        self._context, self._held = context, ExitStack()
        self._blas = None if context.spread is None else blas_threads_for_workers("fit_noise")
        if self._blas is not None:
            folder = self._held.enter_context(tempfile.TemporaryDirectory(dir=context.folder))
            self._folder = Path(folder)
            bare = replace(program, stats=None, plan=None, correction=None, history=(), fx_text=None)
            snapshot.save_program(replace(bare, model=lower(program)), self._folder)
            return
        exact, quantized = (
            self._held.enter_context(Executor(model, context.folder, threads=context.threads))
            for model in (program.require_float_model(), lower(program))
        )
        self._networks = NoiseNetworks(program, context, exact, quantized)

    def __call__(self, pieces: Sequence[NoisePiece], stage: str) -> Iterator[Any]:
        """Yield the results of pieces in their order."""
        context = self._context
        if context.spread is not None and self._blas is not None:
            work = NoiseWork(context.for_workers(), self._blas)
            yield from context.spread.in_order(work, self._folder, pieces, stage, unit="batches")
            return
        for i, piece in enumerate(pieces):
            part = replace(context, progress=part_of_stage(context.progress, i, len(pieces), stage))
            yield piece.perform(replace(self._networks, context=part))

    def __enter__(self) -> NoiseRuns:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()
