"""Trained units, kept in the cache of a compilation: training that was stopped goes on at the unit where it was.

An entry is the folder `unit-<key>` (compiler/core/cache.py). The key of a unit is a digest of the program, its
calibration and its float graph, of the options of the fit, of torch's version and device, of the units that were
trained before it and what came out, where it reads what those compute, and of the unit itself. So a unit from the cache
is the one that training would give.
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

from ..core.cache import EntryForm
from ..core.pipeline import CPU, Context
from ..core.program import Plan, Program
from ..core.program_key import program_key
from ..errors import StatsError
from ..graph.nodes import digest
from .units import UnitToTrain

UNIT = EntryForm("unit", "what a trained unit learned", layout=2)
Learned = Mapping[str, npt.NDArray[Any]]
"""What a unit learned, by the names of its weights or of the parameters of its torch module."""


class UnitCache:
    """The trained units of one run of a pass, in their order. Without a cache it keeps nothing.

    With `apart` no unit reads what another one learned.
    """

    def __init__(self, program: Program, context: Context, options: Mapping[str, Any], *, apart: bool = False) -> None:
        self._cache = context.cache
        self._apart = apart
        self._key = "" if context.cache is None else training_key(program, context, UNIT.layout, options)

    def load(self, unit: UnitToTrain) -> tuple[TrainedUnit, Learned] | None:
        """Return the fit of a unit that was trained behind the same units, and what it learned, or None.

        Raises StatsError for an entry that cannot be read, and for that of another unit.
        """
        if self._cache is None or (known := self._cache.load(UNIT, self._name(unit), _read)) is None:
            return None
        if known[0].unit != unit.name:
            raise StatsError(
                f"the entry of the unit {unit.name!r} is that of {known[0].unit!r}",
                where=self._name(unit),
                hint="delete this entry of the cache",
            )
        self._advance(unit, known[1])
        return known

    def keep(self, unit: UnitToTrain, fit: TrainedUnit, learned: Learned) -> None:
        """Write the fit of a unit and what it learned, which is empty where the unit kept its start."""
        if self._cache is not None:

            def write(folder: Path) -> dict[str, Any]:
                arrays = {name: np.ascontiguousarray(array) for name, array in learned.items()}
                (folder / UNIT.arrays).write_bytes(save(arrays))
                return fit.to_json()

            self._cache.keep(UNIT, self._name(unit), write)
            self._advance(unit, learned)

    def _name(self, unit: UnitToTrain) -> str:
        trained = [str(unit.timely), *unit.weights, "", *unit.quantizers]
        return f"unit-{_digest(self._key, unit.name, *sorted(unit.computed), '', *trained)[:32]}"

    def _advance(self, unit: UnitToTrain, learned: Learned) -> None:
        """Let the keys of later units depend on what this one changed in the graph."""
        if self._apart:
            return
        for name, array in sorted(learned.items()):
            digest_of_array = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
            self._key = _digest(self._key, unit.name, name, digest_of_array)


def _read(data: Any, folder: Path) -> tuple[TrainedUnit, Learned]:
    return Fields(data, str(folder)).finish(TrainedUnit.from_json), load_file(folder / UNIT.arrays)


def training_key(program: Program, context: Context, layout: int, options: Mapping[str, Any]) -> str:
    """Return a digest of a program, of its calibration and float graph, and of the options of a pass that trains."""
    facts = {
        "layout": layout,
        "options": dict(options),
        "float": digest(program.require_float_model()),
        "grids": _digest(*_grids(program.require_plan())),
        "torch": version("torch"),
        # Another device adds in another order. Without the CPU's name, entries of the CPU stay valid.
        **({} if context.device == CPU else {"device": context.device}),
    }
    return program_key(program, context, facts)


def _grids(plan: Plan) -> list[str]:
    """Return the grid of each quantizer as text."""
    return sorted(
        f"{site} {q.axis} {np.asarray(q.grid.qmin).tobytes().hex()} {np.asarray(q.grid.qmax).tobytes().hex()}"
        + ("" if q.levels is None else f" {q.levels.shape} {q.levels.tobytes().hex()}")
        for site, q in plan.quantizers.items()
    )


def _digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
