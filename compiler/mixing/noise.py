"""The noise correction of a bundle of several precisions: each call has the row of the precision that runs it.

Rows were fitted along the float trajectory, each call by itself. So the row of a call does not depend on the precision
of other calls, and rows of several bundles can be combined. A precision without quantizers has no error to correct,
and gets a row that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.steps import Step

from ..correction.noise_report import NoiseReport, merged_report

_SETTINGS = ("deployment", "prediction", "form", "stages", "channel_axis")
CORRECTION_TABLES = tuple(f.name for f in fields(Correction) if f.init and f.name not in _SETTINGS)
"""The tables with one row for each call."""


@dataclass(frozen=True)
class NoiseTables:
    """The noise of one bundle: its tables, the report of its manifest, and whether it has quantizers."""

    correction: Correction | None
    report: Mapping[str, Any] | None
    quantized: bool


def mixed_correction(
    tables: Mapping[str, NoiseTables], calls: Sequence[str], deployment: Deployment, steps: Sequence[Step]
) -> tuple[Correction | None, str]:
    """Return (correction, note): the rows of the precision that runs at each call, or None with the reason."""
    used = {name: tables[name] for name in dict.fromkeys(calls) if tables[name].quantized}
    corrections = {name: table.correction for name, table in used.items() if table.correction is not None}
    if not corrections:
        return None, "none: no precision has one"
    if missing := sorted(set(used) - set(corrections)):
        return None, f"none: {missing[0]} was compiled without one"
    forms = {name: correction.form for name, correction in corrections.items()}
    if len(set(forms.values())) > 1:
        return None, f"none: its forms differ ({', '.join(f'{name}: {form}' for name, form in forms.items())})"
    some = next(iter(corrections.values()))

    def rows(table: str) -> Any:
        neutral = np.full_like(getattr(some, table)[0], 1.0 if table == "scale" else 0.0)
        return np.stack(
            [
                getattr(corrections[name], table)[call] if name in corrections else neutral
                for call, name in enumerate(calls)
            ]
        )

    stages = np.array([step.stage for step in steps], np.int64)
    tables_of_calls = {name: rows(name) for name in CORRECTION_TABLES}
    merged = Correction(
        deployment, some.prediction, some.form, stages, **tables_of_calls, channel_axis=some.channel_axis
    )
    return merged, f"{some.form}, the rows of each call from {', '.join(corrections)}"


def mixed_report(tables: Mapping[str, NoiseTables], calls: Sequence[str], steps: Sequence[Step]) -> NoiseReport | None:
    """Return the manifest's report of the same rows, each with its precision; None if a precision has no report."""
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
    """Return the row of a call of the float network: no error, the sampler's own noise, no figures of a residual."""
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
