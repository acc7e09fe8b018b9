"""Trained units, kept in the cache of a compilation: training that was stopped goes on at the unit where it was.

An entry is the folder `unit-<key>` (compiler/core/cache_entries.py). The key of a unit is a digest of the program, its
calibration and its float graph, of the options of the fit, of the version of torch, of the units that were trained
before it and what came out, and of the unit itself. So a unit from the cache is the one that training would give.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from mezzotint.runtime.bundle.json_fields import Fields
from mezzotint.runtime.bundle.training import TrainedUnit

from ..core.cache_entries import EntryForm, program_key
from ..core.pipeline import Context
from ..core.program import Plan, Program
from ..graph.nodes import digest

UNIT = EntryForm("unit", "the rounding of a trained unit", layout=1)
Ups = Mapping[str, npt.NDArray[np.bool_]]
"""For each weight, by the name of its quantizer's output: which elements round up."""


class UnitCache:
    """The trained units of one run of a pass, in their order. Without a cache it keeps nothing."""

    def __init__(self, program: Program, context: Context, options: Mapping[str, Any]) -> None:
        self._folder = context.cache
        self._key = "" if context.cache is None else _start(program, context, options)

    def load(self, unit: str, computed: frozenset[str]) -> tuple[TrainedUnit, Ups] | None:
        """Return the fit of a unit that was trained behind the same units, and its rounding, or None.

        Raises StatsError for an entry that cannot be read.
        """
        entry = self._entry(unit, computed)
        if entry is None or not entry.exists():
            return None
        fit, ups = UNIT.load(entry, _read)
        self._advance(unit, ups)
        return fit, ups

    def keep(self, unit: str, computed: frozenset[str], fit: TrainedUnit, ups: Ups) -> None:
        """Write the fit of a unit and its rounding; `ups` is empty where the unit kept its start."""
        entry = self._entry(unit, computed)
        if entry is not None:

            def write(folder: Path) -> dict[str, Any]:
                (folder / UNIT.arrays).write_bytes(save({name: np.ascontiguousarray(up) for name, up in ups.items()}))
                return fit.to_json()

            UNIT.keep(entry, write)
            self._advance(unit, ups)

    def _entry(self, unit: str, computed: frozenset[str]) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"unit-{_digest(self._key, unit, *sorted(computed))[:32]}"

    def _advance(self, unit: str, ups: Ups) -> None:
        """Let the keys of later units depend on what this one changed in the graph."""
        for name, up in sorted(ups.items()):
            self._key = _digest(self._key, unit, name, np.packbits(up).tobytes().hex())


def _read(data: Any, folder: Path) -> tuple[TrainedUnit, Ups]:
    return Fields(data, str(folder)).finish(TrainedUnit.from_json), load_file(folder / UNIT.arrays)


def _start(program: Program, context: Context, options: Mapping[str, Any]) -> str:
    facts = {
        "layout": UNIT.layout,
        "options": dict(options),
        "float": digest(program.require_float_model()),
        "grids": _digest(*_grids(program.require_plan())),
        "torch": version("torch"),
    }
    return program_key(program, context, facts)


def _grids(plan: Plan) -> list[str]:
    """Return the grid of each quantizer as text."""
    return sorted(
        f"{site} {q.axis} {np.asarray(q.grid.qmin).tobytes().hex()} {np.asarray(q.grid.qmax).tobytes().hex()}"
        for site, q in plan.quantizers.items()
    )


def _digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
