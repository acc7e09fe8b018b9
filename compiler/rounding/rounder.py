"""One weight rounded against its matrix H, by the options of round_weights: the same here and in another process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats

from ..core.blas_threads import blas_threads_for_workers, with_blas_threads
from ..core.context import Context
from ..core.formats import Grid, Levels, Vectors, of_rows
from ..errors import RecipeError
from . import matrix as rounding
from .codebook import fitted_in_turns
from .exact import obq
from .report import RoundingReport
from .row_scales import refit, search
from .two_sided import RowFeedback, errors_of_rows, two_sided
from .vectors import gptq_vectors, vector_order

RoundingMethod = Literal["nearest", "obq", "gptq", "gptaq", "comq"]


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """A weight `[rows, d]` of the layer `where`, a scale for each row, its grid, and what it is rounded against.

    `grams` is H `[groups, d, d]`, `shift` W D `[rows, d]` of gptaq, `sides` H_O `[groups, rows / groups, ...]` of yaqa.
    """

    where: str
    floats: Floats
    scale: Floats
    per_row: bool
    grid: Grid
    grams: Floats
    shift: Floats | None = None
    sides: Floats | None = None

    def __str__(self) -> str:
        return self.where


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """Grid points s q `[rows, d]`, scales `[rows]`, the grid where it is another one, and what the note says of it."""

    rows: Floats
    scale: Floats
    grid: Grid | None
    report: RoundingReport


@dataclass(frozen=True)
class WeightRounder:
    """How weights are rounded; the fields are options of round_weights."""

    method: RoundingMethod
    scales: Literal["keep", "mse", "output"]
    damp: float
    act_order: bool
    block: int
    alpha: float
    sweeps: int
    refits: int
    exact_inputs: int

    def round(self, weight: WeightMatrix) -> RoundedWeight:
        """Return the rounded weight, group by group of its convolution."""
        if self.scales != "keep" and not weight.per_row:
            raise RecipeError(
                "a weight has one scale for all of its outputs",
                where=weight.where,
                hint="set round_weights.scales to keep",
            )
        floats, scale, grid, grams, report = (
            weight.floats,
            weight.scale.copy(),
            weight.grid,
            weight.grams,
            RoundingReport(),
        )
        values = np.empty_like(floats)
        table = grid.table.copy() if self.refits and isinstance(grid, Levels) else None
        each = len(floats) // len(grams)
        for g, gram in enumerate(grams):
            part = slice(g * each, (g + 1) * each)
            rounding.check_gram(gram, weight.where)
            shift = None if weight.shift is None else weight.shift[part]
            side = None if weight.sides is None else weight.sides[g]
            values[part], scale[part], chosen = self._part(
                floats[part], scale[part], gram, shift, side, of_rows(grid, part), weight.where, report
            )
            if table is not None and isinstance(chosen, Levels):
                table[part] = chosen.table
        report.layer(values, weight.where, self._form(grams.shape[2]))
        return RoundedWeight(values, scale, None if table is None else Levels(table), report)

    def _part(
        self,
        floats: Floats,
        kept: Floats,
        gram: Floats,
        shift: Floats | None,
        side: Floats | None,
        grid: Grid,
        where: str,
        report: RoundingReport,
    ) -> tuple[Floats, Floats, Grid]:
        if isinstance(grid, Vectors) and (self.method in ("comq", "obq") or side is not None):
            rounder = self.method if side is None else "the weighting yaqa"
            raise RecipeError(f"{rounder} rounds no vectors", where=where, hint="set round_weights.method to gptq")
        target: npt.NDArray[np.floating] = floats
        scale, best, left = kept, grid, floats != 0
        held = None if left.all() else left
        if self.scales != "keep":
            importance = np.diagonal(gram) if self.scales == "output" else np.ones(gram.shape[1], np.float32)
            scale = search(floats, kept, grid, importance)
        root, feedback = None, None if side is None else RowFeedback.of(side, self.act_order, self.damp, where)
        if self.method not in ("nearest", "comq"):
            order = rounding.input_order(gram, self.act_order)
            if isinstance(grid, Vectors):
                order = vector_order(gram, grid.table.shape[1], self.act_order)
            root = rounding.inverse_root(gram, order, self.damp, where)
            report.damped(where, self.damp, root.damp)
            if shift is not None:
                target = rounding.shifted_target(floats, shift, root, self.alpha).astype(np.float32)
        if isinstance(grid, Levels) and self.refits:
            again = partial(self._integers, target, gram, root, feedback, held, scale)
            best, integers = fitted_in_turns(target, gram, scale, grid, again, self.refits, where)
        else:
            integers = self._integers(target, gram, root, feedback, held, scale, grid)
        del root
        if self.scales == "output":
            scale = refit(target, integers, gram, scale)
        values = scale[:, None] * integers
        plain = kept[:, None] * rounding.nearest(floats, kept, grid)
        error = errors_of_rows(values - target, gram, side)
        simple = errors_of_rows(plain - target, gram, side)
        better = error < simple
        report.rows(where, np.where(better, error, simple), simple, better)
        if isinstance(best, Levels) and isinstance(grid, Levels) and best is not grid:
            best = Levels(np.where(better[:, None], best.table, grid.table))
        return np.where(better[:, None], values, plain), np.where(better, scale, kept), best

    def _form(self, inputs: int) -> str:
        """Return how a layer with so many inputs is rounded, in words."""
        in_blocks = self.method == "obq" and inputs > self.exact_inputs
        return f"obq in blocks of {self.exact_inputs}" if in_blocks else self.method

    def _integers(
        self,
        target: npt.NDArray[np.floating],
        gram: Floats,
        root: rounding.Root | None,
        feedback: RowFeedback | None,
        held: rounding.Kept | None,
        scale: Floats,
        grid: Grid,
    ) -> Floats:
        if isinstance(grid, Vectors) and root is not None:
            return gptq_vectors(target, root, scale, grid, block=self.block)
        if self.method == "comq":
            return rounding.comq(
                target, gram, scale, grid, sweeps=self.sweeps, block=self.block, kept=held, sort=self.act_order
            )
        if root is None:
            return rounding.nearest(target, scale, grid)
        if self.method == "obq":
            return obq(target, root, scale, grid, exact=self.exact_inputs, kept=held)
        if feedback is not None:
            return two_sided(target, root, feedback, scale, grid, kept=held)
        return rounding.gptq(target, root, scale, grid, block=self.block, kept=held)


@dataclass(frozen=True)
class RoundingWork:
    """Weights that other processes round, with as many threads of BLAS as in the process that hands them out."""

    rounder: WeightRounder
    blas: int

    def open(self, folder: Path, threads: int) -> Callable[[WeightMatrix], RoundedWeight]:
        """Return the function from a weight to its rounded form."""

        def rounded(weight: WeightMatrix) -> RoundedWeight:
            with with_blas_threads(self.blas):
                return self.rounder.round(weight)

        return rounded


def rounded_in_order(
    rounder: WeightRounder, weights: Sequence[WeightMatrix], context: Context, step: str
) -> Iterator[RoundedWeight]:
    """Yield the rounded forms of weights in their order; workers round them where the context has some.

    A weight is asked for when its turn comes, and not again after its rounded form was yielded.
    """
    blas = None if context.spread is None else blas_threads_for_workers(step)
    if context.spread is None or blas is None:
        yield from map(rounder.round, weights)
        return
    with tempfile.TemporaryDirectory(dir=context.folder) as folder:
        yield from context.spread.in_order(RoundingWork(rounder, blas), Path(folder), weights, step, unit=None)
