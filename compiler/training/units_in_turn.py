"""Units are trained: each behind those before it, or all from the start of the pass, here or on workers.

Behind the trained units, as AdaRound and BRECQ do, a unit reads what the prefix computes that is trained already, and
makes up for a part of its error. From the start it reads what the graph computed before the pass. It knows nothing of
the others then, so each unit is a piece of work that another process or machine may have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.bundle.training import TrainedUnit
from mezzotint.runtime.errors import InputError

from ..core.blas_threads import blas_threads_for_workers, with_blas_threads
from ..core.pipeline import CPU, Context
from ..core.program import Program
from ..core.snapshot import load_program, save_program
from ..rounding.weights import find_weights
from .block_data import LossWatcher
from .unit_cache import Learned, UnitCache
from .units import UnitToTrain

Behind = Literal["trained", "start"]
"""The graph whose values a unit reads: with the units before it trained, or as the pass found it."""

Fit = tuple[TrainedUnit, Learned]


class UnitTrainer(Protocol):
    """How a pass trains a unit, as a value that is pickled for workers."""

    @property
    def by(self) -> str:
        """The name of the pass."""

    def train(self, program: Program, context: Context, unit: UnitToTrain, step: LossWatcher) -> Fit:
        """Return the fit of a unit of a program and what it learned, which is empty where the start is better."""

    def written(self, program: Program, context: Context, unit: UnitToTrain, learned: Learned) -> Program:
        """Return the program with what a unit learned."""


@dataclass(frozen=True)
class UnitsInTurn:
    """The trained units of one run of a pass. `watch` returns what a unit reports its steps to."""

    context: Context
    trainer: UnitTrainer
    units: Sequence[UnitToTrain]
    cache: UnitCache
    watch: Callable[[UnitToTrain], LossWatcher]

    def trained(self, program: Program, behind: Behind) -> tuple[Program, list[TrainedUnit]]:
        """Return the program with the units that got better, and the fits of all. Those in the cache are known."""
        fits = []
        apart = self._apart(program) if behind == "start" else None
        scales = _scales_of_weights(program)
        for unit in self.units:
            fit, learned = self._after(program, unit) if apart is None else next(apart)
            if apart is not None and fit.kept and not _has_scales(program, unit, scales):
                fit = replace(fit, kept=False)  # another unit's bias took room: the integers are those of another grid
            fits.append(fit)
            if fit.kept:
                program = self.trainer.written(program, self.context, unit, learned)
        return program, fits

    def _after(self, program: Program, unit: UnitToTrain) -> Fit:
        known = self.cache.load(unit)
        return known or self._keep(unit, self.trainer.train(program, self.context, unit, self.watch(unit)))

    def _keep(self, unit: UnitToTrain, found: Fit) -> Fit:
        self.cache.keep(unit, *found)
        return found

    def _apart(self, program: Program) -> Iterator[Fit]:
        """Yield the fits of all units of one program, in their order."""
        known = {unit.name for unit in self.units if self.cache.load(unit) is not None}
        new = self._computed(program, [unit for unit in self.units if unit.name not in known])
        for unit in self.units:
            yield self._after(program, unit) if unit.name in known else self._keep(unit, next(new))

    def _computed(self, program: Program, units: Sequence[UnitToTrain]) -> Iterator[Fit]:
        """Yield new fits; workers compute them where the context has some."""
        context, trainer = self.context, self.trainer
        blas = None if context.spread is None or not units else blas_threads_for_workers(trainer.by)
        if context.spread is None or blas is None:
            yield from (trainer.train(program, context, unit, self.watch(unit)) for unit in units)
            return
        from .torch_device import torch_threads

        work = UnitWork(trainer, context.for_workers(), version("torch"), torch_threads(context), blas)
        with tempfile.TemporaryDirectory(dir=context.folder) as folder:
            save_program(replace(program, stats=None), Path(folder))
            gpus = 0 if context.device == CPU else 1
            yield from context.spread.in_order(work, Path(folder), units, trainer.by, unit="units", gpus=gpus)


@dataclass(frozen=True, eq=False)
class UnitWork:
    """Units that other processes train, with as many threads of torch and BLAS as in the process that asks for them."""

    trainer: UnitTrainer
    context: Context
    torch: str
    threads: int
    blas: int

    def open(self, folder: Path, threads: int) -> Callable[[UnitToTrain], Fit]:
        """Return the function from a unit to its fit. The folder has the program.

        Raise InputError where this machine has another torch.
        """
        if (here := version("torch")) != self.torch:
            raise InputError(
                f"a machine of the cluster has torch {here}, and the driver {self.torch}",
                where="--cluster",
                hint="install the same versions on all machines: others may train other weights",
            )
        program, _ = load_program(folder)

        def trained(unit: UnitToTrain) -> Fit:
            with tempfile.TemporaryDirectory() as work, with_blas_threads(self.blas):
                device = self.context.device.partition(":")[0]  # a worker sees the GPU that it was given, and no other
                context = replace(self.context, folder=Path(work), threads=self.threads, device=device)
                return self.trainer.train(program, context, unit, _ignored)

        return trained


def _scales_of_weights(program: Program) -> dict[str, Floats]:
    return {weight.name: weight.scale() for weight in find_weights(program.graph)}


def _has_scales(program: Program, unit: UnitToTrain, scales: Mapping[str, Floats]) -> bool:
    """Return whether the weights of a unit have these scales."""
    now = _scales_of_weights(program) if unit.weights else {}
    return all(np.array_equal(now[name], scales[name]) for name in unit.weights)


def _ignored(loss: float | None = None) -> None:
    """Take a step that is not shown: the driver shows whole units."""
