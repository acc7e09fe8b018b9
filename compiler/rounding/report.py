"""What round_weights says in its note: errors beside those of nearest, dampings, and how many rows stayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats

from ..errors import PassError


@dataclass
class RoundingReport:
    """Errors, dampings and methods of the rounded weights, for the note."""

    errors: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    damps: dict[str, float] = field(default_factory=dict)
    methods: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    count: int = 0

    def rows(
        self, where: str, error: npt.NDArray[np.float64], simple: npt.NDArray[np.float64], better: npt.NDArray[np.bool_]
    ) -> None:
        self.errors[where] = self.errors.get(where, 0.0) + np.array([error.sum(), simple.sum()])
        self.kept += int((~better).sum())
        self.count += len(better)

    def damped(self, where: str, wanted: float, used: float) -> None:
        if used != wanted:
            self.damps[where] = max(used, self.damps.get(where, 0.0))

    def layer(self, values: Floats, where: str, form: str) -> None:
        if not np.isfinite(values).all():
            raise PassError("rounded weights are not finite", where=where)
        self.methods[form] = self.methods.get(form, 0) + 1

    def add(self, other: RoundingReport) -> None:
        """Add what was found of other weights."""
        for where, pair in other.errors.items():
            self.errors[where] = self.errors.get(where, 0.0) + pair
        for where, damp in other.damps.items():
            self.damps[where] = max(damp, self.damps.get(where, 0.0))
        for form, count in other.methods.items():
            self.methods[form] = self.methods.get(form, 0) + count
        self.kept += other.kept
        self.count += other.count

    def note(self, count: int, stages: int) -> str:
        methods = ", ".join(f"{method}: {n}" for method, n in sorted(self.methods.items()))
        shares = [error / simple for error, simple in self.errors.values() if simple > 0]
        share = float(np.mean(shares)) if shares else 1.0
        return (
            f"{methods} of {count} weights in {stages} stages; error of their outputs {share:.0%} of nearest's (mean); "
            f"{self.kept} of {self.count} rows stayed at nearest, which was no worse" + damped_words(self.damps)
        )


def damped_words(damps: Mapping[str, float]) -> str:
    """Return the layers whose H needed more damping than the option says, in words that end a note."""
    raised = ", ".join(f"{name} ({damp:g})" for name, damp in damps.items())
    return f"; damping raised: {raised}" if raised else ""
