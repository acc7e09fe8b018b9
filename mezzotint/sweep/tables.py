"""A sweep as a table for each machine."""

from __future__ import annotations

from collections.abc import Sequence

from ..text import console
from .sweep import MachineSweep, SweptCall


def print_sweep(found: Sequence[MachineSweep], calls: int) -> None:
    """Print the sweeps of machines; each time is the median of so many calls."""
    for sweep in found:
        machine, usage = sweep.machine, sweep.usage
        engine = f"{usage.engine} ({usage.library})"
        title = f"{machine.host}: {machine.processor}, {machine.cores} cores, {engine}, median of {calls} calls"
        columns = ["threads", "batch", "one call, ms", "samples/s"]
        timed = any(call.floating is not None for call in sweep.calls)
        console.print_table(
            title,
            [*columns, *(["float, ms", "speed-up"] if timed else [])],
            [_cells(call) for call in sweep.calls],
        )


def _cells(call: SweptCall) -> tuple[object, ...]:
    row = call.to_json()
    mine = (call.threads, call.batch, f"{row['call_ms']['median']:.3f}", f"{row['samples_per_second']:.1f}")
    if call.floating is None:
        return mine
    low, high = row["speedup_range"]
    return (*mine, f"{row['float_call_ms']['median']:.3f}", f"{row['speedup']:.2f}x ({low:.2f} to {high:.2f})")
