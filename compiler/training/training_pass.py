"""What the passes that train have in common. torch is loaded when one of them runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import ClassVar

from mezzotint.runtime.progress import DETAIL, Progress
from mezzotint.runtime.sampling.deployment import Deployment

from ..core.pipeline import Context, Pass
from ..core.program import Plan, Program
from ..correction.trial import judged
from ..errors import RecipeError, StatsError
from .block_data import LossWatcher
from .torch_check import device_is_there, require_torch
from .units import GraphUnit

SHOWN_UNITS = 60
"""Names of units in an error."""


class TrainingPass(Pass):
    """A pass that trains the quantized graph against the float graph, behind insert_qdq."""

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        require_torch(self.name, "trains")

    def trains_on(self, device: str) -> bool:
        return device_is_there(device)

    def code(self, program: Program) -> str:
        from ..torch_graph.convert import to_torch

        return str(to_torch(program.model, signature=program.signature).module.code)

    def plan_of(self, program: Program) -> Plan:
        """Return the plan. Raise StatsError where it or the float graph is gone."""
        if program.float_model is None or program.plan is None:
            raise StatsError("the float graph to compare with is gone", where=self.name, hint="run insert_qdq first")
        return program.plan

    def watcher(self, progress: Progress, unit: str, total: int) -> LossWatcher:
        """Return what reports one step more of a unit's `total` at each call, with the loss."""
        done = itertools.count(1)

        def step(loss: float | None = None) -> None:
            detail = "" if loss is None else f"{DETAIL}loss {loss:.3g}"
            progress(f"{self.name}: {unit}{detail}", min(next(done), total), total)

        return step

    def matching(self, units: Sequence[GraphUnit], patterns: Sequence[str], what: str) -> list[GraphUnit]:
        """Return the units that match a pattern, or all without patterns; `what` is what each of them has.

        Raise RecipeError for a pattern that matches none.
        """
        for pattern in patterns:
            if not any(fnmatchcase(unit.name, pattern) for unit in units):
                names = [unit.name for unit in units]
                shown = ", ".join(names[:SHOWN_UNITS]) + (", ..." if len(names) > SHOWN_UNITS else "")
                raise RecipeError(
                    f"{self.name}.units: {pattern!r} matches no unit with {what}",
                    where=self.name,
                    hint=f"patterns are those of a shell, `*` and `?`; the {len(names)} units are {shown}",
                )
        return [unit for unit in units if not patterns or any(fnmatchcase(unit.name, p) for p in patterns)]

    def judged(self, before: Program, after: Program, context: Context, held_out: int, note: str) -> Program:
        """Return `after`, or `before` where images of `held_out` samples are better by it; 0 keeps `after`.

        What was trained is in the history either way, and says whether it is in the graph.
        """
        result = judged(before, after, context, held_out, note, self.name)
        if result.model is after.model:
            return result
        new = after.training[len(before.training) :]
        thrown_away = tuple(replace(unit, kept=False) for unit in new)
        return replace(result, training=(*before.training, *thrown_away))
