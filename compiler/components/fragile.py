"""Which layers of a component stay in float: those of its roles, and those whose quantization costs the most.

The candidates are units: the layers of one module, such as an attention or a feed-forward part. Where the component
misses the floor, each unit is quantized alone, and its noise at the outputs is measured. The noisiest units join the
islands until what is left should keep the floor, noises being added; then the component is measured again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from glob import escape

import numpy as np

from ..core.pipeline import Context
from ..core.program import Program
from ..graph.ops import layers
from .classes import ComponentClass
from .data import ComponentData, ComponentPasses
from .fidelity import Outputs, compared
from .program import measured, outputs_of, run_on

MOST_UNITS = 48


def quantize_robustly(
    program: Program,
    row: ComponentClass,
    passes: ComponentPasses,
    data: ComponentData,
    expected: Outputs,
    context: Context,
) -> Program:
    """Return the quantized program, with as many layers in float as `floor_db` needs.

    `expected` are torch's outputs, or those of the exported graph, for the held-out data.
    """
    program = measured(program, context, data.calibration)

    def quantized(*names: str) -> tuple[Program, float]:
        islands = (*row.islands, *map(escape, names))
        made = run_on(program, passes.quantize(islands), context, {})
        made = _with_reason(made, set(names), passes.floor_db)
        return made, min(compared(expected, outputs_of(made, context, data.held_out)).values())

    made, db = quantized()
    if db >= passes.floor_db:
        return made
    units = _units([layer.name for layer in layers(program.graph) if layer.kind != "attention"])
    every = [name for names in units for name in names]
    noise: dict[tuple[str, ...], float] = {}
    for i, unit in enumerate(units):
        context.progress("find fragile layers", i, len(units))
        noise[unit] = _power(quantized(*(name for name in every if name not in unit))[1])
    context.progress("find fragile layers", len(units), len(units))
    ordered = sorted(units, key=lambda unit: -noise[unit])
    left = np.cumsum([noise[unit] for unit in reversed(ordered)])[::-1]  # what stays when the units before are float
    count = int(np.count_nonzero(left > _power(passes.floor_db)))
    while db < passes.floor_db and count <= len(ordered):
        made, db = quantized(*(name for unit in ordered[:count] for name in unit))
        count = count + 1 if count < len(ordered) else len(ordered) + 1
    return made


def _with_reason(program: Program, names: set[str], floor_db: float) -> Program:
    """Return the program whose plan says why the layers of these names stay in float."""
    plan = program.require_plan()
    reason = f"fragile: with it in 8 bits the component would be below {floor_db:g} dB on held-out data"
    return replace(
        program, plan=replace(plan, islands={**plan.islands, **dict.fromkeys(names & set(plan.islands), reason)})
    )


def _power(db: float) -> float:
    """Return the noise of a signal of power one. What is not finite is the largest noise."""
    return float("inf") if math.isnan(db) else 10 ** (-db / 10)


def _units(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the layers of a module together: of the innermost ones, or of outer ones where these are too many."""
    deepest = max((name.count("/") for name in names), default=0)
    units: dict[str, list[str]] = {}
    for depth in range(deepest, -1, -1):
        units = {}
        for name in names:
            units.setdefault("/".join(name.split("/")[: depth + 1]), []).append(name)
        if len(units) <= MOST_UNITS:
            break
    return [tuple(unit) for unit in units.values()]
