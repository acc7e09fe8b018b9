"""The noise correction of a bundle of several precisions: statistics belong to the precision that runs at each call.

Rows were fitted along the float trajectory, each call by itself, so the row of a call does not depend on what the other
calls run: those of several bundles can be put together. A precision without quantizers has no error to correct, and
gets the row that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.steps import Step

from ..correction.noise_report import Report, merged_report

_FACTS = ("deployment", "prediction", "form", "stages")
TABLES = tuple(f.name for f in fields(Correction) if f.init and f.name not in _FACTS)
"""The tables with one row for each call."""


@dataclass(frozen=True)
class NoiseTables:
    """What one bundle knows of its noise: the tables, the manifest's report, and whether it has quantizers at all."""

    correction: Correction | None
    report: Mapping[str, Any] | None
    quantized: bool


def mixed_correction(
    tables: Mapping[str, NoiseTables], calls: Sequence[str], deployment: Deployment, steps: Sequence[Step]
) -> tuple[Correction | None, str]:
    """The rows of the precision that runs at each call, or None; and in words what was done and why."""
    used = {name: tables[name] for name in dict.fromkeys(calls) if tables[name].quantized}
    found = {name: table.correction for name, table in used.items() if table.correction is not None}
    if not found:
        return None, "none: no precision has one"
    if missing := sorted(set(used) - set(found)):
        return None, f"none: {missing[0]} was compiled without one"
    forms = {name: correction.form for name, correction in found.items()}
    if len(set(forms.values())) > 1:
        return None, f"none: its forms differ ({', '.join(f'{name}: {form}' for name, form in forms.items())})"
    some = next(iter(found.values()))

    def rows(table: str) -> Any:
        neutral = np.full_like(getattr(some, table)[0], 1.0 if table == "scale" else 0.0)
        return np.stack(
            [getattr(found[name], table)[call] if name in found else neutral for call, name in enumerate(calls)]
        )

    stages = np.array([step.stage for step in steps], np.int64)
    merged = Correction(deployment, some.prediction, some.form, stages, **{name: rows(name) for name in TABLES})
    return merged, f"{some.form}, the rows of each call from {', '.join(found)}"


def mixed_report(tables: Mapping[str, NoiseTables], calls: Sequence[str], steps: Sequence[Step]) -> Report | None:
    """The manifest's report of the same rows, each with its precision; None where one of them has none."""
    used = {name: tables[name] for name in dict.fromkeys(calls) if tables[name].quantized}
    reports = {name: table.report for name, table in used.items() if table.report}
    if not reports or set(reports) != set(used):
        return None
    some = next(iter(reports.values()))
    rows = [
        {
            **(reports[name]["calls"][call] if name in reports else _neutral(step, some["calls"][call])),
            "precision": name,
        }
        for call, (name, step) in enumerate(zip(calls, steps, strict=True))
    ]
    return merged_report(str(some["form"]), rows, gate=all(report["gate"] for report in reports.values()))


def _neutral(step: Step, like: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a call whose network is the float one: no error, the sampler's own noise, no figures of a residual."""
    known = {
        "timestep": step.timestep,
        "stage": step.stage,
        **dict.fromkeys(("slope", "bias", "spread"), 0.0),
        "kept": "none",
        "sqnr_db": dict.fromkeys(like["sqnr_db"]),
        **dict.fromkeys(("variance_kept", "clamped"), False),
        "sigma": step.sigma,
        "noise": step.sigma,
    }
    return {key: known.get(key) for key in like}
