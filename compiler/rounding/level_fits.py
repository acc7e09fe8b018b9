"""Levels of a codebook fitted to the rows of a weight: the methods of choose_levels, which has their sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats

from ..core.formats import INT8, Grid, Levels, Vectors, round_on
from ..core.program import Quantizer
from ..errors import RecipeError
from ..scales import kmeans
from ..scales.affine_levels import affine_levels
from ..scales.codebooks import FLOAT_FORMS, SIGNS, float_levels, normal_levels, twin_log_levels
from ..scales.pyramids import pyramid_table
from ..scales.vector_codebooks import vector_table
from .row_scales import scales_in_turns, search

LevelMethod = Literal["kmeans", "normal", "float", "log", "affine", "vectors", "pyramid"]
OF_VECTORS: tuple[LevelMethod, ...] = ("vectors", "pyramid")
LevelTables = Literal["row", "tensor"]
FloatForm = Literal["best", "e2m1", "e1m2", "e3m0", "e2m0", "e1m1"]
LOG_ETAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
LOG_SHARES = (1.0, 0.99, 0.98)
TURNS = 3  # of scales and a shared table

_Table = npt.NDArray[np.int8]


@dataclass(frozen=True)
class LevelFit:
    """How levels are chosen; the fields are options of choose_levels.

    Importances `[groups, d]` are the weights of the squared errors of a weight's inputs.
    """

    method: LevelMethod = "kmeans"
    tables: LevelTables = "row"
    form: FloatForm = "best"
    size: int = 2
    nested: bool = True

    def quantizer(self, old: Quantizer, rows: Floats, importance: Floats, by: str, where: str) -> Quantizer:
        """Return a weight's quantizer `old` with a codebook of as many bits, fitted to its rows `[rows, d]`."""
        table, scale = self.fit(rows, importance, old.format.bits, where)
        vectors = self.method in OF_VECTORS
        return replace(
            old,
            format=INT8,
            scale=scale,
            zero_point=np.zeros(len(scale), np.int8),
            by=by,
            levels=None if vectors else table,
            vectors=table if vectors else None,
        )

    def fit(self, rows: Floats, importance: Floats, bits: int, where: str) -> tuple[_Table, Floats]:
        """Return levels `[count]` or `[rows, count]`, or vectors `[count, size]`, and scales `[rows]`."""
        count = 1 << bits
        if self.method == "kmeans" and self.tables == "row":
            scale = kmeans.own_scales(rows)
            tables = [kmeans.best_levels(rows[p], scale[p], h, count) for p, h in _parts(rows, importance)]
            return np.concatenate(tables), scale
        if self.method in ("kmeans", "vectors"):
            scale = kmeans.own_scales(rows)
            each = np.repeat(importance, len(rows) // len(importance), axis=0)
            table = self._shared(rows, scale, each, count)
            for _ in range(TURNS - 1):
                grid = Vectors(table) if self.method == "vectors" else Levels(table)
                scale = _searched(rows, scale, grid, importance, fitted=bits == 1)
                table = self._shared(rows, scale, each, count)
            return table, scale
        if self.method == "log":
            if bits == 1:
                hint = "set choose_levels.method to normal or kmeans, or choose 2 bits or more"
                raise RecipeError("two logarithmic grids of 1 bit have one level each", where=where, hint=hint)
            return _best_log(rows, importance, bits)
        if self.method == "affine":
            found = [affine_levels(rows[p], h, bits) for p, h in _parts(rows, importance)]
            return np.concatenate([table for table, _ in found]), np.concatenate([scale for _, scale in found])
        own = kmeans.own_scales(rows)
        if self.method == "pyramid":
            table = pyramid_table(self.size, bits * self.size, self.nested)
            return table, _searched(rows, own, Vectors(table), importance, fitted=True)
        if self.method == "normal":
            tables = [SIGNS if bits == 1 else normal_levels(bits)]
        else:
            tables = self._float_tables(bits, where)
        fitted = [(table, _searched(rows, own, Levels(table), importance, fitted=bits == 1)) for table in tables]
        return min(fitted, key=lambda one: sum(level_errors(rows, one[1], Levels(one[0]), importance)))

    def _shared(self, rows: Floats, scale: Floats, importance: Floats, count: int) -> _Table:
        if self.method == "vectors":
            return vector_table(rows, scale, importance, count**self.size, self.size)
        return kmeans.shared_levels(rows, scale, importance, count)

    def _float_tables(self, bits: int, where: str) -> list[_Table]:
        forms = FLOAT_FORMS.get(bits, {})
        names = list(forms) if self.form == "best" else [self.form]
        if not forms or not set(names) <= set(forms):
            raise RecipeError(
                f"a weight has {bits} bits, and the float format is {self.form}",
                where=where,
                hint="; ".join(f"{b} bits: {', '.join(each)}" for b, each in FLOAT_FORMS.items()),
            )
        return [float_levels(*forms[name]) for name in names]


def _parts(rows: Floats, importance: Floats) -> Iterator[tuple[slice, Floats]]:
    """Yield the rows of each group of a convolution with the importance of its inputs `[d]`."""
    each = len(rows) // len(importance)
    for g, h in enumerate(importance):
        yield slice(g * each, (g + 1) * each), h


def _searched(rows: Floats, scale: Floats, grid: Grid, importance: Floats, *, fitted: bool) -> Floats:
    """Return the best scale of each row, for a grid that all rows share.

    It is `fitted` behind the search where it may lie outside: below for 1 bit, above for pyramids.
    """
    found = []
    for part, h in _parts(rows, importance):
        best = search(rows[part], scale[part], grid, h)
        found.append(scales_in_turns(rows[part], best, grid, h) if fitted else best)
    return np.concatenate(found)


def level_errors(rows: Floats, scale: Floats, grid: Grid, importance: Floats) -> npt.NDArray[np.float64]:
    """Return sum_i h_i (w_i - s l)^2 of each row."""
    difference = rows - scale[:, None] * round_on(rows / scale[:, None], grid, 0)
    parts = [np.square(difference[p]) @ h.astype(np.float64) for p, h in _parts(rows, importance)]
    return np.concatenate(parts)


def _best_log(rows: Floats, importance: Floats, bits: int) -> tuple[_Table, Floats]:
    table, scale = twin_log_levels(rows, LOG_ETAS[0], LOG_SHARES[0], bits)
    error = level_errors(rows, scale, Levels(table), importance)
    for eta in LOG_ETAS:
        for share in LOG_SHARES:
            tried, its_scale = twin_log_levels(rows, eta, share, bits)
            loss = level_errors(rows, its_scale, Levels(tried), importance)
            better = loss < error
            table[better], scale[better], error[better] = tried[better], its_scale[better], loss[better]
    return table, scale
