"""A diagnosis as tables."""

from __future__ import annotations

import numpy as np

from mezzotint.runtime.compare import StepSQNR

from ..text import console
from .diagnose import Diagnosis

COLUMNS = 8  # timesteps that fit next to a name


def print_diagnosis(diagnosis: Diagnosis, top: int) -> None:
    """Print totals, the `top` most expensive layers with their suggestions, and the layers that were not measured."""
    on = "" if diagnosis.engine.engine == "cpu" else f" on {diagnosis.engine.text()}"
    totals = {f"the bundle{on}": _worst(diagnosis.bundle), "its layers": _worst(diagnosis.together)}
    console.print_pairs("epsilon, SQNR in dB", totals)
    if not diagnosis.same_weights:
        console.print_warning("the reference has other weights than the model that the bundle was compiled from")
    rows = []
    for layer in diagnosis.layers[:top]:
        step, db = layer.cost.worst()
        call, local = min(layer.local.items(), key=lambda item: item[1])
        cost = f"{layer.cost.pooled():.1f}, worst {db:.1f} at {step}"
        rows.append(
            (layer.name, layer.kernel, f"{layer.share:.1%}", cost, f"{local:.1f} at {call}", layer.suggestion.kind)
        )
    columns = ("layer", "kernel", "share", "cost alone, dB", "own output, worst dB", "advice")
    console.print_table("layers by their cost at the output", columns, rows)
    for layer in diagnosis.layers[:top]:
        if layer.suggestion.kind != "-":
            remedy = "Keep it in float" if layer.suggestion.kind == "island" else layer.suggestion.what
            console.print_line(f"{layer.name}: {layer.suggestion.why}. {remedy}")
    if option := diagnosis.option(top):
        console.print_line(f"to keep these layers in float: {option}")
    _print_steps(diagnosis, top)
    for name, why in diagnosis.unknown.items():
        console.print_line(f"{name} was not measured: {why}")
    if len(diagnosis.layers) > top:
        console.print_line(f"{len(diagnosis.layers) - top} layers with smaller costs: see --top, --json")


def _print_steps(diagnosis: Diagnosis, top: int) -> None:
    """Print the cost of each layer at up to COLUMNS calls, evenly chosen."""
    calls = list(diagnosis.calls)
    chosen = sorted({calls[round(i)] for i in np.linspace(0, len(calls) - 1, min(COLUMNS, len(calls)))})
    rows = [
        (layer.name, *(f"{layer.cost.per_step()[call]:.1f}" for call in chosen))
        for layer in diagnosis.layers[:top]
        if layer.suggestion.kind != "-"
    ]
    columns = ("layer", *(f"t={diagnosis.calls[call]:g}" for call in chosen))
    console.print_table("cost alone by timestep, SQNR of epsilon in dB", columns, rows)


def _worst(measure: StepSQNR) -> str:
    step, db = measure.worst()
    return f"{measure.pooled():.2f}, worst {db:.2f} at call {step}"
